"""RULER's official metrics, one prediction at a time, as fractions. They know no model and no prompt."""

from collections.abc import Callable, Sequence

from pipeline.errors import PipelineError
from pipeline.params import RULER_TASKS

Metric = Callable[[str, Sequence[str]], float]


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Fraction of the references that occur in the prediction, case ignored."""
    return sum(_occurs(reference, prediction) for reference in references) / _count(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1.0 if any of the references occurs in the prediction, case ignored, else 0.0."""
    _count(references)
    return max(_occurs(reference, prediction) for reference in references)


def metric_for(task: str) -> Metric:
    """The official metric of a RULER task: any alias for questions, all answers for the rest."""
    if task not in RULER_TASKS:
        raise PipelineError(f"'{task}' is no RULER task; known: {', '.join(RULER_TASKS)}.")
    return string_match_part if task.startswith("qa_") else string_match_all


def _occurs(reference: str, prediction: str) -> float:
    return 1.0 if reference.lower() in prediction.lower() else 0.0


def _count(references: Sequence[str]) -> int:
    if not references:
        raise PipelineError("string match needs at least one reference; the sample has no answers.")
    return len(references)
