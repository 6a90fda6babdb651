"""Metrics against what they are compared with: NVIDIA's wheel, the harness, LongBench."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.metrics import METRICS, most_likely, rouge_l, string_match_all, string_match_part

# Few letters, so that references do occur; ß and İ change length when lowered.
TEXT = st.text("aAbB ßİ7", max_size=12)


@pytest.fixture(scope="module")
def official(ruler_wheel: Path) -> dict[str, Any]:
    return runpy.run_path(str(ruler_wheel / "long_context_eval/eval/synthetic/constants.py"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(prediction=TEXT, references=st.lists(TEXT, min_size=1, max_size=5))
def test_metrics_equal_the_official_ones(official: dict[str, Any], prediction: str, references: list[str]) -> None:
    for ours, name in ((string_match_all, "string_match_all"), (string_match_part, "string_match_part")):
        theirs = official[f"{name}_per_sample"]([prediction], [references])[0]
        assert 100 * ours(prediction, references) == pytest.approx(theirs, abs=1e-9)
        assert round(100 * ours(prediction, references), 2) == official[name]([prediction], [references])


def test_missing_references_are_refused() -> None:
    for metric in (string_match_all, string_match_part):
        with pytest.raises(PipelineError, match="no answers"):
            metric("text", [])


@pytest.mark.parametrize(
    ("nll", "answers", "normalised", "right"),
    [
        ([3.0, 2.0, 4.0], ["a", "b", "c"], False, 1),
        ([3.0, 2.0, 4.0], ["a", "b", "longer"], False, 1),
        ([3.0, 2.0, 4.0], ["a", "b", "longer"], True, 2),
        # Characters count, not bytes: 4/2 loses against 3/2.
        ([4.0, 3.0], ["éé", "bb"], True, 1),
        ([2.0, 2.0], ["a", "b"], False, 0),
        ([2.0, 3.0], ["", "b"], True, 1),
    ],
)
def test_known_choices(nll: list[float], answers: list[str], normalised: bool, right: int) -> None:
    for gold in range(len(nll)):
        assert most_likely(nll, gold, list(map(len, answers)) if normalised else None) == float(gold == right)


@given(st.lists(st.tuples(st.floats(0.01, 50), st.integers(1, 30)), min_size=1, max_size=5))
def test_the_norm_divides_by_characters(choices: list[tuple[float, int]]) -> None:
    nll, lengths = [value for value, _ in choices], [length for _, length in choices]
    # lm-eval 0.4.13, ConfigurableTask.process_results.
    lls, completion_len = tuple(-value for value in nll), np.array(lengths, dtype=float)
    for gold in range(len(choices)):
        assert most_likely(nll, gold) == float(np.argmax(lls) == gold)
        assert most_likely(nll, gold, lengths) == float(np.argmax(lls / completion_len) == gold)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("lengths", [None, [1, 1, 1]])
def test_nothing_is_counted_from_likelihoods_that_are_none(bad: float, lengths: list[int] | None) -> None:
    for place in range(3):
        nll = [1.0, 2.0, 3.0]
        nll[place] = bad
        with pytest.raises(PipelineError, match=r"likelihoods .* are not finite; the model overflows in its dtype"):
            most_likely(nll, 0, lengths)
    with pytest.raises(PipelineError, match="not finite"):
        most_likely([bad] * 3, 0, lengths)


@pytest.mark.parametrize(
    ("nll", "gold"), [([1.0], 0), ([1.0, 2.0, 3.0], 0), ([], 0), ([1.0, 2.0], 2), ([1.0, 2.0], -1)]
)
def test_likelihoods_that_are_not_the_choices_are_refused(nll: list[float], gold: int) -> None:
    with pytest.raises(PipelineError, match=f"2 choices have {len(nll)} likelihoods, choice {gold} is right"):
        most_likely(nll, gold, [1, 1])


def test_a_sentence_too_long_to_compare_counts_nothing() -> None:
    # LongBench's bare except does the same.
    words = " ".join(f"w{number}" for number in range(sys.getrecursionlimit() + 10))
    assert rouge_l(words, words) == 0.0


def test_only_perplexity_is_better_when_it_is_lower() -> None:
    assert {name for name, metric in METRICS.items() if metric.lower_is_better} == {"nll"}
