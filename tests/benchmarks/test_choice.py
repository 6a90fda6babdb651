"""Accuracy of a choice: known values, and the harness's arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.benchmarks.choice import choice_outcome
from pipeline.errors import PipelineError


@pytest.mark.parametrize(
    ("nll", "answers", "metric", "right"),
    [
        ([3.0, 2.0, 4.0], ["a", "b", "c"], "accuracy", 1),
        ([3.0, 2.0, 4.0], ["a", "b", "longer"], "accuracy", 1),
        ([3.0, 2.0, 4.0], ["a", "b", "longer"], "accuracy_norm", 2),
        # Characters count, not bytes: 4/2 loses against 3/2.
        ([4.0, 3.0], ["éé", "bb"], "accuracy_norm", 1),
        ([2.0, 2.0], ["a", "b"], "accuracy", 0),
        ([2.0, 3.0], ["", "b"], "accuracy_norm", 1),
    ],
)
def test_known_outcomes(nll: list[float], answers: list[str], metric: str, right: int) -> None:
    for gold in range(len(nll)):
        assert choice_outcome(nll, answers, metric, gold) == float(gold == right)


@given(st.lists(st.tuples(st.floats(0.01, 50), st.integers(1, 30)), min_size=1, max_size=5))
def test_the_norm_divides_by_characters(choices: list[tuple[float, int]]) -> None:
    nll, answers = [value for value, _ in choices], ["x" * length for _, length in choices]
    # lm-eval 0.4.13, ConfigurableTask.process_results.
    lls, completion_len = tuple(-value for value in nll), np.array([float(len(answer)) for answer in answers])
    for gold in range(len(choices)):
        assert choice_outcome(nll, answers, "accuracy", gold) == float(np.argmax(lls) == gold)
        assert choice_outcome(nll, answers, "accuracy_norm", gold) == float(np.argmax(lls / completion_len) == gold)


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(PipelineError, match="'nll' with the right choice 0 is no multiple choice"):
        choice_outcome([1.0], ["a"], "nll", 0)
    with pytest.raises(PipelineError, match="right choice None"):
        choice_outcome([1.0], ["a"], "accuracy", None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", ["accuracy", "accuracy_norm"])
def test_nothing_is_counted_from_likelihoods_that_are_none(bad: float, metric: str) -> None:
    for place in range(3):
        nll = [1.0, 2.0, 3.0]
        nll[place] = bad
        with pytest.raises(PipelineError, match=r"likelihoods .* are not finite; the model overflows in its dtype"):
            choice_outcome(nll, ["a", "b", "c"], metric, 0)
    with pytest.raises(PipelineError, match="not finite"):
        choice_outcome([bad] * 3, ["a", "b", "c"], metric, 0)


@pytest.mark.parametrize(
    ("nll", "gold"), [([1.0], 0), ([1.0, 2.0, 3.0], 0), ([], 0), ([1.0, 2.0], 2), ([1.0, 2.0], -1)]
)
def test_likelihoods_that_are_not_the_choices_are_refused(nll: list[float], gold: int) -> None:
    with pytest.raises(PipelineError, match=f"2 choices have {len(nll)} likelihoods, choice {gold} is right"):
        choice_outcome(nll, ["a", "b"], "accuracy", gold)
