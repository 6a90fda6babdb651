"""HellaSwag: what happens next (lm-eval 0.4.13, ``tasks/hellaswag``)."""

import re
from typing import ClassVar, Literal

from pydantic import model_validator

from pipeline.benchmarks.base_choice import MultipleChoice, PlainRow, Question
from pipeline.samples.rows import Row, RowModel, Text, WholeNumber, is_null


class _HellaswagRow(RowModel):
    activity_label: Text
    ctx_a: Text
    ctx_b: Text
    endings: list[Text]
    label: WholeNumber

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_empty(cls, row: Row) -> Row:
        # Half of the rows have an empty ctx_b, which spreadsheets and pandas read as no value.
        return row | {"ctx_b": ""} if "ctx_b" in row and is_null(row["ctx_b"]) else row


class HellaSwag(MultipleChoice):
    """The harness's normalised accuracy."""

    repository: ClassVar[str] = "Rowan/hellaswag"
    files: ClassVar[tuple[str, ...]] = ("data/validation", "validation")
    normalised: ClassVar[bool] = True

    kind: Literal["hellaswag"]

    @classmethod
    def columns(cls, row: Row) -> type[RowModel]:
        """The plain form has lost the activity's label."""
        return PlainRow if is_null(row.get("ctx_a")) else _HellaswagRow

    @classmethod
    def render(cls, row: Row) -> Question:
        """The beginning, without the marks of WikiHow, and its endings."""
        if "ctx_a" in row:
            query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            choices, gold = row["endings"], row["label"]
        else:
            query, choices, gold = row["question"], row["choices"], row["answer"]
        return Question(_without_brackets(query), tuple(map(_without_brackets, choices)), gold)


def _without_brackets(text: str) -> str:
    # Marks of the WikiHow part; the order of the steps matters.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
