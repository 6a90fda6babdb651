"""BoolQ: a passage, then a yes-or-no question about it (lm-eval 0.4.13, ``tasks/super_glue/boolq``)."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from pipeline.benchmarks.base_choice import MultipleChoice, Question
from pipeline.samples.rows import FilledText, Row, RowModel, WholeNumber, flag, is_null

_WORDS = {"yes": True, "no": False}


def _zero_or_one(value: Any) -> Any:
    """0 or 1 for every spelling of a truth value; other values as they are."""
    truth = _WORDS.get(value.lower(), flag(value)) if isinstance(value, str) else flag(value)
    return int(truth) if isinstance(truth, bool) else value


class _BoolqRow(RowModel):
    """``label`` or ``answer``, a truth value or 0 and 1."""

    question: FilledText
    passage: FilledText
    answer: Annotated[WholeNumber, BeforeValidator(_zero_or_one)]

    @model_validator(mode="before")
    @classmethod
    def _either_name(cls, row: Row) -> Row:
        named = [row[name] for name in ("label", "answer") if not is_null(row.get(name))]
        if len(named) == 2 and _zero_or_one(named[0]) != _zero_or_one(named[1]):
            raise ValueError("its label and its answer differ")
        return row | {"answer": named[0]} if named else row


class BoolQ(MultipleChoice):
    """The harness's accuracy. A late question comes after the passage was compressed."""

    repository: ClassVar[str] = "aps/super_glue"
    files: ClassVar[tuple[str, ...]] = ("boolq/validation", "data/validation", "validation")
    form: ClassVar[type[RowModel]] = _BoolqRow

    kind: Literal["boolq"]

    @classmethod
    def render(cls, row: Row) -> Question:
        """Passage, question, answer."""
        passage = row["passage"]
        context = f"{passage}\nQuestion: {row['question']}?\nAnswer:"
        return Question(context, ("no", "yes"), row["answer"], late_from=len(passage))
