"""ARC-Challenge: questions of school science (lm-eval 0.4.13, ``tasks/arc``)."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from pipeline.benchmarks.base_choice import LETTERS, MultipleChoice, PlainRow, Question, place
from pipeline.samples.rows import FilledText, Identifier, Row, RowModel, Text, WholeNumber


class _Choices(RowModel):
    text: list[Text]
    label: list[Identifier]

    @model_validator(mode="after")
    def _one_label_each(self) -> "_Choices":
        if len(self.text) != len(self.label) or len(set(self.label)) != len(self.label):
            raise ValueError("every choice should have one text and one label of its own")
        return self


class _ArcRow(RowModel):
    question: FilledText
    choices: _Choices
    answerKey: Identifier

    @model_validator(mode="before")
    @classmethod
    def _from_structures(cls, row: Row) -> Row:
        # Databases turn a structure of two lists into a list of structures.
        choices = row.get("choices")
        if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
            return row | {"choices": {name: [choice.get(name) for choice in choices] for name in ("text", "label")}}
        return row

    @model_validator(mode="after")
    def _labelled(self) -> "_ArcRow":
        if self.answerKey not in self.choices.label:
            raise ValueError(f"answerKey {self.answerKey} is none of the labels {', '.join(self.choices.label)}")
        return self


def _unambiguous(value: Any) -> Any:
    # ARC's own labels are numbers from 1 in some rows: "2" may be the second choice or the third.
    if isinstance(value, str) and value not in LETTERS:
        raise ValueError("it should be a number counted from 0, or a letter; numbers as text may be labels from 1")
    return value


class _PlainArcRow(PlainRow):
    answer: Annotated[WholeNumber, BeforeValidator(place), BeforeValidator(_unambiguous)]


class ArcChallenge(MultipleChoice):
    """The harness's accuracy."""

    repository: ClassVar[str] = "allenai/ai2_arc"
    files: ClassVar[tuple[str, ...]] = ("ARC-Challenge/test", "test")

    kind: Literal["arc_challenge"]

    @classmethod
    def columns(cls, row: Row) -> type[RowModel]:
        """The hub's form has labels beside its choices."""
        choices = row.get("choices")
        labelled = isinstance(choices, dict) or (
            isinstance(choices, list) and any(isinstance(choice, dict) for choice in choices)
        )
        return _ArcRow if labelled else _PlainArcRow

    @classmethod
    def render(cls, row: Row) -> Question:
        """Question, answer."""
        choices = row["choices"]
        if isinstance(choices, dict):
            texts, gold = choices["text"], choices["label"].index(row["answerKey"])
        else:
            texts, gold = choices, row["answer"]
        return Question(f"Question: {row['question']}\nAnswer:", tuple(texts), gold)
