from dataclasses import fields, replace

import polars as pl
import pytest

from pipeline.reporting import aggregate, findings
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.params import ReportParams, ShownAs
from pipeline.reporting.styles import Styles

REPORT = ReportParams(bootstrap_samples=500, confidence=0.95, example_layer=0, example_kv_head=0, seed=0, titles={})
STYLES = Styles(("ruler",), ("exact", "rloo"), {"ruler": ShownAs(title="RULER", letter="R")}, {"lagkv": False}, {})
EMPTY = pl.DataFrame(
    schema=dict.fromkeys(("model", "benchmark", "metric", "trained_on", "estimator", "scope"), pl.String)
)
NOTHING = Numbers(*(EMPTY for _ in fields(Numbers)))
SCHEMA = {"policy": pl.String, "trained_on": pl.String, "budget": pl.Int32, "value": pl.Float64}


def _sentences(ours: float, theirs: float, spread: float = 0.01, samples: int = 12) -> str:
    rows = [
        {"policy": policy, "trained_on": trained_on, "budget": 64, "sample_id": str(i), "value": level + sign * spread}
        for policy, trained_on, level, signs in (("kvp-exact", "ruler", ours, 1), ("lagkv", None, theirs, -1))
        for i in range(samples)
        for sign in [signs * (-1) ** i]
    ]
    evaluation = pl.DataFrame(rows, schema_overrides=SCHEMA).with_columns(
        pl.lit("m").alias("model"),
        pl.lit("ruler").alias("benchmark"),
        pl.lit("vt").alias("task"),
        pl.lit("string_match").alias("metric"),
        pl.lit(3).alias("n_tokens"),
    )
    scores = aggregate.score_table(evaluation, REPORT)
    differences = aggregate.score_difference_table(evaluation, STYLES.reference, REPORT)
    return " ".join(findings.headline(replace(NOTHING, scores=scores, score_differences=differences), STYLES))


def test_a_win_a_loss_and_a_draw_read_differently() -> None:
    assert "KVP is better than the attention-free baselines" in _sentences(0.8, 0.5)
    assert "KVP is worse than the attention-free baselines" in _sentences(0.5, 0.8)
    assert "KVP cannot be told apart from the attention-free baselines" in _sentences(0.5, 0.5, spread=0.2)


def test_a_single_sample_decides_nothing() -> None:
    sentences = _sentences(0.8, 0.5, samples=1)
    assert "KVP cannot be told apart from the attention-free baselines" in sentences
    assert "KVP_R exact has accuracy 0.81 (one sample)" in sentences
    assert "nan" not in sentences


def test_numbers_are_those_of_the_table() -> None:
    assert "KVP_R exact has accuracy 0.80 (0." in _sentences(0.8, 0.5)


@pytest.mark.parametrize(
    ("low", "high", "lower_is_better", "expected"),
    [
        (0.1, 0.2, False, "better"),
        (0.1, 0.2, True, "worse"),
        (-0.2, -0.1, True, "better"),
        (-0.2, -0.1, False, "worse"),
        (-0.1, 0.1, True, "undecided"),
        (0.0, 0.0, False, "undecided"),
    ],
)
def test_verdict(low: float, high: float, lower_is_better: bool, expected: str) -> None:
    assert findings.verdict(low, high, lower_is_better) == expected


def test_steps_that_were_not_reached_are_said_so() -> None:
    row = {
        "model": "m",
        "trained_on": "ruler",
        "rloo_steps": 300,
        "rloo_cost": 2.0,
        "exact_steps": None,
        "exact_cost": 2.2,
    }
    steps = pl.DataFrame([row], schema_overrides={"exact_steps": pl.Int32})
    (sentence,) = findings.headline(replace(NOTHING, steps=steps), STYLES)
    assert "did not reach" in sentence
