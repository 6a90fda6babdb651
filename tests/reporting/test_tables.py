import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.errors import PipelineError
from pipeline.params import Params
from pipeline.reporting import tables
from tests.reporting.synthetic import MODEL

Finished = tuple[Path, Params]


def test_accuracy_is_the_mean_over_samples(finished: Finished) -> None:
    root, params = finished
    evaluation = tables.read_evaluations(root / "evaluations", params.matrix)
    scores = tables.score_table(evaluation, params.report)
    raw = tables.select(evaluation, "kvp-exact", "ruler").filter(pl.col("metric") == "string_match", budget=160)
    row = tables.select(scores, "kvp-exact", "ruler").filter(metric="accuracy", budget=160).row(0, named=True)
    assert row["mean"] == pytest.approx(raw["value"].mean())
    assert row["samples"] == raw.height
    assert row["low"] < row["mean"] < row["high"]


def test_perplexity_pools_tokens(finished: Finished) -> None:
    root, params = finished
    evaluation = tables.read_evaluations(root / "evaluations", params.matrix)
    scores = tables.score_table(evaluation, params.report)
    raw = tables.select(evaluation, "snapkv", None).filter(metric="nll", budget=48)
    row = tables.select(scores, "snapkv", None).filter(metric="perplexity", budget=48).row(0, named=True)
    tokens = raw["n_tokens"].to_numpy()
    assert row["mean"] == pytest.approx(math.exp((raw["value"].to_numpy() * tokens).sum() / tokens.sum()))


def test_differences_are_paired(finished: Finished) -> None:
    root, params = finished
    evaluation = tables.read_evaluations(root / "evaluations", params.matrix)
    # A baseline that is KVP less a constant has a difference without any spread.
    ours = tables.select(evaluation.filter(metric="string_match"), "kvp-exact", "ruler")
    shifted = ours.with_columns(
        pl.lit("knorm").alias("policy"), pl.lit(None, pl.String).alias("trained_on"), pl.col("value") - 0.25
    )
    differences = tables.score_difference_table(pl.concat([ours, shifted]), params.report)
    assert differences.height == len(params.evaluation.budgets)
    for column in ("difference", "low", "high"):
        np.testing.assert_allclose(differences[column].to_numpy(), 0.25)


def test_each_policy_is_compared_with_baselines_and_its_other_estimator(finished: Finished) -> None:
    root, params = finished
    evaluation = tables.read_evaluations(root / "evaluations", params.matrix)
    mine = tables.select(tables.score_difference_table(evaluation, params.report), "kvp-exact", "dialogues")
    assert set(mine["baseline"]) == {
        "kvp-rloo", "lagkv", "keydiff", "knorm", "streaming-llm", "random", "snapkv", "tova",
    }  # fmt: skip
    assert set(mine.filter(baseline="kvp-rloo")["baseline_trained_on"]) == {"dialogues"}


def test_intervals_do_not_depend_on_the_order_of_rows(finished: Finished) -> None:
    root, params = finished
    evaluation = tables.read_evaluations(root / "evaluations", params.matrix)
    shuffled = evaluation.sample(fraction=1, shuffle=True, seed=1)
    assert tables.score_table(evaluation, params.report).equals(tables.score_table(shuffled, params.report))


def test_a_missing_or_infinite_value_is_named(finished: Finished) -> None:
    root, params = finished
    evaluation = tables.read_evaluations(root / "evaluations", params.matrix)
    with pytest.raises(PipelineError, match="every sample exactly once"):
        tables.score_table(evaluation.slice(1), params.report)
    broken = evaluation.with_columns(value=pl.when(pl.col("budget") == 48).then(math.inf).otherwise(pl.col("value")))
    with pytest.raises(PipelineError, match="not finite"):
        tables.score_table(broken, params.report)


def test_normalised_cost_averages_heads_within_a_sample(finished: Finished) -> None:
    root, params = finished
    cost = tables.read_costs(root / "evaluations", params.matrix)
    evaluation = tables.read_evaluations(root / "evaluations", params.matrix)
    normalised = tables.normalised_costs(cost, evaluation)
    totals = cost.filter(pl.col("budget").is_null(), pl.col("sample_id") == "ruler-0003", pl.col("policy") == "knorm")
    sizes = totals["cache_size"].unique().sort().to_list()
    for scope, kept in (("mid-sequence", sizes[:1]), ("whole prompt", sizes[1:]), ("pooled", sizes)):
        part = totals.filter(pl.col("cache_size").is_in(kept))
        row = normalised.filter(sample_id="ruler-0003", policy="knorm", scope=scope).row(0, named=True)
        assert row["value"] == pytest.approx((part["cost"] / part["optimal_cost"]).mean())
        assert row["task"] == "niah_single_2"
    table = tables.cost_table(normalised, params.report)
    assert table.filter(policy="oracle")["mean"].to_list() == pytest.approx([1.0] * 6)


def test_cost_curves_lie_on_the_grid_and_share_one_scale(finished: Finished) -> None:
    root, params = finished
    cost = tables.read_costs(root / "evaluations", params.matrix)
    curves = tables.cost_curves(cost)
    assert sorted(curves["fraction"].unique()) == [k / 16 for k in range(1, 16)]
    one = cost.filter(corpus="ruler", policy="tova", layer=1, kv_head=0)
    best = one.filter(pl.col("budget").is_null()).select("sample_id", "cache_size", total="optimal_cost")
    expected = (
        one.drop_nulls("budget")
        .join(best, on=["sample_id", "cache_size"])
        .filter((pl.col("budget") * 16 / pl.col("cache_size")).round() == 4)
        .select((pl.col("cost") / pl.col("total")).mean())
        .item()
    )
    row = curves.filter(corpus="ruler", policy="tova", layer=1, kv_head=0, fraction=0.25)
    assert row["cost"].item() == pytest.approx(expected)


def test_steps_until_exact_reaches_rloo() -> None:
    def line(estimator: str, values: list[float]) -> pl.DataFrame:
        return pl.DataFrame(
            {"model": MODEL, "corpus": "ruler", "estimator": estimator, "metric": "validation_cost"}
            | {"step": [20 * (i + 1) - 1 for i in range(len(values))], "mean": values}
        )

    reached = tables.steps_table(pl.concat([line("rloo", [5.0, 4.0, 3.0, 2.5]), line("exact", [4.0, 2.5, 2.6, 2.0])]))
    assert reached.rows() == [(MODEL, "ruler", 80, 2.5, 40, 2.0)]
    missed = tables.steps_table(pl.concat([line("rloo", [5.0, 2.0]), line("exact", [4.0, 2.5])]))
    assert missed.rows() == [(MODEL, "ruler", 40, 2.0, None, 2.5)]
    assert tables.steps_table(line("exact", [4.0, 3.0])).is_empty()


def test_only_entries_of_the_matrix_are_read(finished: Finished, tmp_path: Path) -> None:
    root, params = finished
    shutil.copytree(root / "evaluations", tmp_path / "evaluations")
    shutil.copytree(tmp_path / "evaluations" / MODEL / "ruler", tmp_path / "evaluations" / MODEL / "dropped")
    matrix = params.matrix.model_copy(update={"corpus": ("dialogues",), "benchmark": ("dialogues",)})
    evaluation = tables.read_evaluations(tmp_path / "evaluations", matrix)
    assert evaluation["benchmark"].unique().to_list() == ["dialogues"]


def test_missing_files_and_columns_are_sentences(finished: Finished, tmp_path: Path) -> None:
    _, params = finished
    with pytest.raises(PipelineError, match="does not exist; run the stage"):
        tables.read_evaluations(tmp_path, params.matrix)
    pl.DataFrame({"model": ["x"]}).write_parquet(tmp_path / "short.parquet")
    with pytest.raises(PipelineError, match="lacks the columns cost, layer"):
        tables.read_table(tmp_path / "short.parquet", ["model", "layer", "cost"])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(PipelineError, match="cannot be read"):
        tables.read_table(tmp_path / "torn.parquet", ["model"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "0.5"])
@pytest.mark.parametrize(
    ("columns", "name", "where"),
    [
        (tables.EVALUATION_COLUMNS, "value", "policy p1, trained_on t, budget 1, benchmark 1, sample_id s1"),
        (tables.EVALUATION_COLUMNS, "n_tokens", "policy p1"),
        (tables.COST_COLUMNS, "cost", "policy p1, trained_on t, corpus 1, sample_id s1"),
        (tables.COST_COLUMNS, "optimal_cost", "policy p1"),
        (tables.CURVE_COLUMNS, "value", "metric 1, step 1, layer 1, kv_head 1"),
    ],
)
def test_what_is_no_number_is_named_and_not_averaged(
    columns: tuple[str, ...], name: str, where: str, bad: float | str | None, tmp_path: Path
) -> None:
    def write(value: float | str | None) -> Path:
        rows = [
            dict.fromkeys(columns, 1) | {"policy": f"p{i}", "sample_id": f"s{i}", "trained_on": "t"} for i in range(3)
        ]
        frame = pl.DataFrame([{column: row[column] for column in columns} for row in rows])
        values = [0.5, value, 0.5] if not isinstance(value, str) else ["0.5", value, "0.5"]
        frame.with_columns(pl.Series(name, values)).write_parquet(tmp_path / "table.parquet")
        return tmp_path / "table.parquet"

    assert tables.read_table(write(0.5), columns).height == 3
    message = f"its column {name} is String" if isinstance(bad, str) else f"{name} is not finite but {bad} for {where}"
    with pytest.raises(PipelineError, match=message) as caught:
        tables.read_table(write(bad), columns)
    assert str(caught.value).startswith(str(tmp_path / "table.parquet"))
