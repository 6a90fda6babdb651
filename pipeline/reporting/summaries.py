"""The small files DVC compares: metrics as JSON, plots as CSV. It computes nothing that ``aggregate.py`` does not.

Numbers are rounded to six digits: sums over many threads differ in the last bits from run to run.
"""

import math
from typing import Any

import polars as pl

from pipeline.reporting.styles import Styles, policy_name

DIGITS = 6


def score_metrics(scores: pl.DataFrame) -> dict[str, Any]:
    """model -> benchmark -> metric -> policy -> budget -> mean."""
    tree: dict[str, Any] = {}
    for row in scores.iter_rows(named=True):
        budget = "full" if row["budget"] is None else f"budget_{row['budget']}"
        _leaf(tree, row["model"], row["benchmark"], row["metric"], _policy(row))[budget] = rounded(row["mean"])
    return tree


def cost_metrics(costs: pl.DataFrame) -> dict[str, Any]:
    """model -> benchmark -> scope -> policy -> normalised cost with its interval."""
    tree: dict[str, Any] = {}
    for row in costs.iter_rows(named=True):
        leaf = _leaf(tree, row["model"], row["benchmark"], row["scope"], _policy(row))
        # A single sample has no interval, and JSON no number that is none.
        leaf |= {name: rounded(row[name]) for name in ("mean", "low", "high") if math.isfinite(row[name])}
    return tree


def training_metrics(training: pl.DataFrame, steps: pl.DataFrame) -> dict[str, Any]:
    """model -> trained_on -> final validation cost of each estimator, and steps of exact to reach rloo's."""
    tree: dict[str, Any] = {}
    final = training.filter(pl.col("metric") == "validation_cost").sort("step")
    for row in final.group_by("model", "trained_on", "estimator", maintain_order=True).last().iter_rows(named=True):
        _leaf(tree, row["model"], row["trained_on"])[f"{row['estimator']}_validation_cost"] = rounded(row["mean"])
    for row in steps.iter_rows(named=True):
        leaf = _leaf(tree, row["model"], row["trained_on"])
        leaf |= {"rloo_steps": row["rloo_steps"], "exact_steps_to_rloo": row["exact_steps"]}
    return tree


def score_plot(scores: pl.DataFrame, metric: str, styles: Styles) -> pl.DataFrame:
    """One metric against budget; a policy without a budget is a horizontal line over all budgets."""
    part = scores.filter(pl.col("metric") == metric)
    ceiling = part.filter(pl.col("budget").is_null()).drop("budget")
    levels = part.select("model", "benchmark", "budget").drop_nulls("budget").unique()
    lines = pl.concat(
        [
            part.filter(pl.col("budget").is_not_null()),
            ceiling.join(levels, on=["model", "benchmark"]).select(part.columns),
        ]
    )
    return _plot(lines, styles, ["budget"], {"mean": metric, "low": "low", "high": "high"})


def cost_plot(curves: pl.DataFrame, styles: Styles) -> pl.DataFrame:
    """Cost against the share of the cache that is kept, mean over heads."""
    keys = ["model", "benchmark", "policy", "trained_on", "fraction"]
    return _plot(curves.group_by(keys).agg(pl.col("cost").mean()), styles, ["fraction"], {"cost": "cost"})


def training_plot(training: pl.DataFrame) -> pl.DataFrame:
    """Loss, gradient norm and validation cost against step: mean and quantiles over heads."""
    return (
        training.select(
            pl.format("{} / {} / {}", "model", "trained_on", "metric").alias("panel"),
            pl.col("estimator").alias("series"),
            *training.columns,
        )
        .with_columns(pl.selectors.float().round_sig_figs(DIGITS))
        .sort("panel", "series", "step")
    )


def rounded(value: float) -> float:
    """``value`` to six significant digits."""
    return float(f"{value:.{DIGITS}g}")


def _plot(frame: pl.DataFrame, styles: Styles, x: list[str], values: dict[str, str]) -> pl.DataFrame:
    pairs = frame.select("policy", "trained_on").unique()
    series = pairs.with_columns(series=pl.Series([styles.label(*pair) for pair in pairs.rows()], dtype=pl.String))
    return (
        frame.join(series, on=["policy", "trained_on"], nulls_equal=True)
        .select(
            pl.format("{} / {}", "model", "benchmark").alias("panel"),
            "series",
            "policy",
            "trained_on",
            *x,
            *(pl.col(name).round_sig_figs(DIGITS).alias(shown) for name, shown in values.items()),
        )
        .sort("panel", "series", *x)
    )


def _leaf(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    for name in path:
        tree = tree.setdefault(name, {})
    return tree


def _policy(row: dict[str, Any]) -> str:
    return policy_name(row["policy"], row["trained_on"])
