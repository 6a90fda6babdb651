"""The section ``sensitivity`` of studies/params.yaml, and what it must have in common with params.yaml."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.errors import PipelineError
from pipeline.params import Params
from pipeline.section import Name, PositiveInt, Section, read
from studies import _paths

Inputs = Literal["keys", "values", "both", "hidden"]


class Longer(Section):
    """Sequences of ``length`` tokens, ``samples`` for each task, that policies trained on shorter ones are tried on."""

    length: PositiveInt
    samples: PositiveInt


class StudySensitivity(Section):
    """Axes of the study.

    The base variant is the ``train`` section with ``base_steps`` on the heads of ``layers``; each axis changes one
    thing of it. ``training_fraction`` is of the training sequences; ``rate_factor`` multiplies the learning rate
    of each estimator, the sorting surrogate of figure 5b included. ``longer`` names benchmarks whose policies are also
    evaluated on longer sequences than they were trained on.
    """

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    seeds: Annotated[int, Field(ge=2)]
    base_steps: PositiveInt
    training_fraction: tuple[Annotated[float, Field(gt=0, le=1)], ...]
    steps: tuple[PositiveInt, ...]
    hidden_width: tuple[PositiveInt, ...]
    inputs: tuple[Inputs, ...]
    rate_factor: tuple[Annotated[float, Field(gt=0)], ...]
    longer: dict[Name, Longer] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> "StudySensitivity":
        for name in ("layers", "training_fraction", "steps", "hidden_width", "inputs", "rate_factor"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice")
        return self


def read_study(params: Params, path: Path = _paths.PARAMS) -> StudySensitivity:
    """The study's section, held against the whole of params.yaml.

    Raises
    ------
    PipelineError
        The section is missing or says what it may not, or does not fit the benchmarks that policies are trained on.
    """
    study = read("sensitivity", StudySensitivity, path)
    if problem := _misfit(params, study):
        raise PipelineError(f"{path}: {problem}.")
    return study


def training_length(params: Params, trained_on: str) -> int:
    """Tokens that the sequences of a benchmark in ``matrix.trained_on`` are made to, the shortest of its tasks."""
    length = params.benchmarks[trained_on].samples.shortest
    if length is None:
        raise PipelineError(
            f"matrix.trained_on names '{trained_on}', whose texts are as long as its rows; the sensitivity study "
            "compares lengths: name benchmarks that have one."
        )
    return length


def titles(params: Params) -> dict[str, str]:
    """What a reader sees for each benchmark, no two alike."""
    shown = {name: entry.shown.title for name, entry in params.benchmarks.items()}
    alike = list(shown.values())
    return {name: title if alike.count(title) == 1 else f"{title} ({name})" for name, title in shown.items()}


def _misfit(params: Params, study: StudySensitivity) -> str | None:
    if "exact" not in params.estimators:
        return "sensitivity: its base variant needs the estimator 'exact', which is not in estimators of params.yaml"
    for name, longer in study.longer.items():
        found = params.benchmarks[name].samples if name in params.matrix.trained_on else None
        if found is None or found.kind != "ruler":
            return f"sensitivity.longer names '{name}', which is no RULER benchmark in matrix.trained_on"
        if found.tokens is None or longer.length <= found.tokens:
            return f"sensitivity.longer.{name}: length {longer.length} is not above that of the benchmark"
    return None
