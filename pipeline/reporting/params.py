"""The sections of params.yaml that only a reader sees: the report, and what things are called in it."""

from typing import Annotated

from pydantic import Field

from pipeline.section import Name, PositiveInt, Section, Seed


class ReportParams(Section):
    """Bootstrap of the tables, the head shown in figures 1 and 5a, and what baselines are called (by default, as in
    ``baselines``).
    """

    bootstrap_samples: PositiveInt
    confidence: Annotated[float, Field(gt=0, lt=1)]
    example_layer: Annotated[int, Field(ge=0)]
    example_kv_head: Annotated[int, Field(ge=0)]
    seed: Seed
    titles: dict[Name, str]


class ShownAs(Section):
    """What a reader is told of a benchmark.

    Attributes
    ----------
    title
        Its name in figures and tables.
    letter
        Subscript of the policies that are trained on it, as KVP_R; its own name in params.yaml by default.
    stands_in_for
        Which benchmark of the paper it replaces, printed wherever its numbers appear.
    """

    title: str
    letter: str | None = None
    stands_in_for: str | None = None
