import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.errors import PipelineError
from pipeline.reporting import aggregate
from pipeline.reporting.read import read_tables
from pipeline.reporting.run import Run
from pipeline.tables import COST, EVALUATION
from tests.reporting.synthetic import MODEL

Finished = tuple[Path, Run]


def read_evaluations(root: Path) -> pl.DataFrame:
    return read_tables(sorted(root.glob("scores/*/*.parquet")), EVALUATION)


def read_costs(root: Path) -> pl.DataFrame:
    return read_tables(sorted(root.glob("answers/*/*/cost.parquet")), COST)


def test_accuracy_is_the_mean_over_samples(finished: Finished) -> None:
    root, run = finished
    evaluation = read_evaluations(root)
    scores = aggregate.score_table(evaluation, run.report)
    raw = aggregate.select(evaluation, "kvp-exact", "ruler").filter(pl.col("metric") == "string_match", budget=160)
    row = aggregate.select(scores, "kvp-exact", "ruler").filter(metric="accuracy", budget=160).row(0, named=True)
    assert row["mean"] == pytest.approx(raw["value"].mean())
    assert row["samples"] == raw.height
    assert row["low"] < row["mean"] < row["high"]


def test_perplexity_pools_tokens(finished: Finished) -> None:
    root, run = finished
    evaluation = read_evaluations(root)
    scores = aggregate.score_table(evaluation, run.report)
    raw = aggregate.select(evaluation, "snapkv", None).filter(metric="nll", budget=48)
    row = aggregate.select(scores, "snapkv", None).filter(metric="perplexity", budget=48).row(0, named=True)
    tokens = raw["n_tokens"].to_numpy()
    assert row["mean"] == pytest.approx(math.exp((raw["value"].to_numpy() * tokens).sum() / tokens.sum()))


def test_differences_are_paired(finished: Finished) -> None:
    root, run = finished
    evaluation = read_evaluations(root)
    # A baseline that is KVP less a constant has a difference without any spread.
    ours = aggregate.select(evaluation.filter(metric="string_match"), "kvp-exact", "ruler")
    shifted = ours.with_columns(
        pl.lit("knorm").alias("policy"), pl.lit(None, pl.String).alias("trained_on"), pl.col("value") - 0.25
    )
    differences = aggregate.score_difference_table(pl.concat([ours, shifted]), "kvp-exact", run.report)
    assert differences.height == len(run.budgets)
    for column in ("difference", "low", "high"):
        np.testing.assert_allclose(differences[column].to_numpy(), 0.25)


def test_each_policy_is_compared_with_baselines_and_its_other_estimator(finished: Finished) -> None:
    root, run = finished
    evaluation = read_evaluations(root)
    mine = aggregate.select(
        aggregate.score_difference_table(evaluation, "kvp-exact", run.report), "kvp-exact", "dialogues"
    )
    assert set(mine["baseline"]) == {
        "kvp-rloo", "lagkv", "keydiff", "knorm", "streaming-llm", "random", "snapkv", "tova",
    }  # fmt: skip
    assert set(mine.filter(baseline="kvp-rloo")["baseline_trained_on"]) == {"dialogues"}


def test_intervals_do_not_depend_on_the_order_of_rows(finished: Finished) -> None:
    root, run = finished
    evaluation = read_evaluations(root)
    shuffled = evaluation.sample(fraction=1, shuffle=True, seed=1)
    assert aggregate.score_table(evaluation, run.report).equals(aggregate.score_table(shuffled, run.report))


def test_a_missing_or_infinite_value_is_named(finished: Finished) -> None:
    root, run = finished
    evaluation = read_evaluations(root)
    with pytest.raises(PipelineError, match="every sample exactly once"):
        aggregate.score_table(evaluation.slice(1), run.report)
    broken = evaluation.with_columns(value=pl.when(pl.col("budget") == 48).then(math.inf).otherwise(pl.col("value")))
    with pytest.raises(PipelineError, match="not finite"):
        aggregate.score_table(broken, run.report)


def test_an_unknown_metric_is_named(finished: Finished) -> None:
    root, run = finished
    evaluation = read_evaluations(root).with_columns(pl.col("metric").replace({"nll": "bleu"}))
    with pytest.raises(PipelineError, match=r"metric bleu, which is not in pipeline/metrics\.py; known: string_match"):
        aggregate.score_table(evaluation, run.report)


def test_normalised_cost_averages_heads_within_a_sample(finished: Finished) -> None:
    root, run = finished
    cost = read_costs(root)
    evaluation = read_evaluations(root)
    normalised = aggregate.normalised_costs(cost, evaluation)
    totals = cost.filter(pl.col("budget").is_null(), pl.col("sample_id") == "ruler-0003", pl.col("policy") == "knorm")
    sizes = totals["cache_size"].unique().sort().to_list()
    for scope, kept in (("mid-sequence", sizes[:1]), ("whole prompt", sizes[1:]), ("pooled", sizes)):
        part = totals.filter(pl.col("cache_size").is_in(kept))
        row = normalised.filter(sample_id="ruler-0003", policy="knorm", scope=scope).row(0, named=True)
        assert row["value"] == pytest.approx((part["cost"] / part["optimal_cost"]).mean())
        assert row["task"] == "niah_single_2"
    table = aggregate.cost_table(normalised, run.report)
    assert table.filter(policy="oracle")["mean"].to_list() == pytest.approx([1.0] * 6)


def test_cost_curves_lie_on_the_grid_and_share_one_scale(finished: Finished) -> None:
    root, _ = finished
    cost = read_costs(root)
    curves = aggregate.cost_curves(cost)
    assert sorted(curves["fraction"].unique()) == [k / 16 for k in range(1, 16)]
    one = cost.filter(benchmark="ruler", policy="tova", layer=1, kv_head=0)
    best = one.filter(pl.col("budget").is_null()).select("sample_id", "cache_size", total="optimal_cost")
    expected = (
        one.drop_nulls("budget")
        .join(best, on=["sample_id", "cache_size"])
        .filter((pl.col("budget") * 16 / pl.col("cache_size")).round() == 4)
        .select((pl.col("cost") / pl.col("total")).mean())
        .item()
    )
    row = curves.filter(benchmark="ruler", policy="tova", layer=1, kv_head=0, fraction=0.25)
    assert row["cost"].item() == pytest.approx(expected)


def test_steps_until_exact_reaches_rloo() -> None:
    def line(estimator: str, values: list[float]) -> pl.DataFrame:
        return pl.DataFrame(
            {"model": MODEL, "trained_on": "ruler", "estimator": estimator, "metric": "validation_cost"}
            | {"step": [20 * (i + 1) - 1 for i in range(len(values))], "mean": values}
        )

    reached = aggregate.steps_table(
        pl.concat([line("rloo", [5.0, 4.0, 3.0, 2.5]), line("exact", [4.0, 2.5, 2.6, 2.0])])
    )
    assert reached.rows() == [(MODEL, "ruler", 80, 2.5, 40, 2.0)]
    missed = aggregate.steps_table(pl.concat([line("rloo", [5.0, 2.0]), line("exact", [4.0, 2.5])]))
    assert missed.rows() == [(MODEL, "ruler", 40, 2.0, None, 2.5)]
    assert aggregate.steps_table(line("exact", [4.0, 3.0])).is_empty()
