"""MMLU: exam questions of 57 subjects (lm-eval 0.4.13, ``tasks/mmlu/default``)."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pipeline.benchmarks.base_choice import LETTERS, MultipleChoice, Question, place
from pipeline.samples.rows import FilledText, Row, RowModel, Text, WholeNumber


class _MmluRow(RowModel):
    subject: FilledText
    question: FilledText
    choices: Annotated[list[Text], Field(min_length=4, max_length=4)]
    answer: Annotated[WholeNumber, BeforeValidator(place)]


class Mmlu(MultipleChoice):
    """The harness's accuracy; a sample's task is its subject."""

    repository: ClassVar[str] = "cais/mmlu"
    files: ClassVar[tuple[str, ...]] = ("all/test", "*/test", "test")
    form: ClassVar[type[RowModel]] = _MmluRow

    kind: Literal["mmlu"]

    @classmethod
    def render(cls, row: Row) -> Question:
        """The choices stand in the context; a letter is chosen."""
        subject = row["subject"]
        listed = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS[:4], row["choices"], strict=True))
        context = (
            f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
            f"{row['question'].strip()}\n{listed}Answer:"
        )
        return Question(context, LETTERS[:4], row["answer"], subject)
