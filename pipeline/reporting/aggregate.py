"""Every number that is shown, as queries over the result tables. It reads, draws and writes nothing.

Intervals come from resampling samples (stratified by task), never heads or tokens: heads of one
sample are not independent, so they are averaged first. The ends of the interval of a single sample are not a number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import PipelineError
from pipeline.metrics import METRICS
from pipeline.reporting.bootstrap import Floats, percentile_interval, resampling_counts, weighted_means
from pipeline.reporting.params import ReportParams
from pipeline.reporting.styles import Pair, Styles
from pipeline.tables import FULL, GRID, ORACLE

POLICY = ["policy", "trained_on"]
# MMLU has 57 subjects: a table or a figure of so many columns cannot be read.
MOST_TASKS = 20
SCOPES = ("pooled", "mid-sequence", "whole prompt")
PERPLEXITY = METRICS["nll"].title
LOWER_IS_BETTER = frozenset({"normalised_cost", *(m.title for m in METRICS.values() if m.lower_is_better)})


def score_table(evaluation: pl.DataFrame, report: ReportParams) -> pl.DataFrame:
    """Accuracy and perplexity of each policy at each budget.

    Returns
    -------
    model, benchmark, metric ("accuracy", "perplexity"), policy, trained_on, budget, mean, low,
    high, samples. Perplexity is exp(sum nll * n_tokens / sum n_tokens).
    """
    return _interval_table(_scores(evaluation), ["model", "metric", "benchmark"], [*POLICY, "budget"], report)


def task_table(evaluation: pl.DataFrame, report: ReportParams) -> pl.DataFrame:
    """As :func:`score_table`, for each task of each benchmark that has several, up to ``MOST_TASKS``."""
    tasks = _scores(evaluation).filter(
        pl.col("task").n_unique().over("model", "benchmark", "metric").is_between(2, MOST_TASKS)
    )
    return _interval_table(tasks, ["model", "benchmark", "metric", "task"], [*POLICY, "budget"], report)


def score_difference_table(evaluation: pl.DataFrame, reference: str, report: ReportParams) -> pl.DataFrame:
    """The policies called ``reference`` minus each baseline and other estimator on the same samples, at each budget.

    Returns
    -------
    model, benchmark, metric, policy, trained_on, baseline, baseline_trained_on, budget, difference,
    low, high.
    """
    return _difference_table(_scores(evaluation), reference, ["model", "benchmark", "metric"], ["budget"], report)


def normalised_costs(cost: pl.DataFrame, evaluation: pl.DataFrame) -> pl.DataFrame:
    """Normalised cost of each sample: cost over the best order's cost, averaged over heads.

    Returns
    -------
    model, benchmark, scope (one of ``SCOPES``), policy, trained_on, sample_id, task, value, weight.
    The whole prompt is a sample's largest cache; pooled is the mean over its cache sizes.
    """
    sample = ["model", "benchmark", "sample_id"]
    tasks = evaluation.select(*sample, "task").unique()
    per_size = (
        cost.lazy()
        .filter(pl.col("budget").is_null(), pl.col("optimal_cost") > 0)
        .group_by(*sample, *POLICY, "cache_size")
        .agg(value=(pl.col("cost") / pl.col("optimal_cost")).mean())
        .with_columns(
            scope=pl.when(pl.col("cache_size") == pl.col("cache_size").max().over(sample))
            .then(pl.lit("whole prompt"))
            .otherwise(pl.lit("mid-sequence"))
        )
    )
    keys = [*sample, *POLICY, "scope"]
    return (
        pl.concat([per_size.with_columns(scope=pl.lit("pooled")), per_size])
        .group_by(keys)
        .agg(pl.col("value").mean())
        .join(tasks.lazy(), on=sample, how="left")
        .with_columns(pl.col("task").fill_null(""), weight=pl.lit(1.0))
        .sort(keys, nulls_last=True)
        .collect()
    )


def cost_table(normalised: pl.DataFrame, report: ReportParams) -> pl.DataFrame:
    """Mean and interval of :func:`normalised_costs` for each model, benchmark, scope and policy."""
    return _interval_table(normalised, ["model", "benchmark", "scope"], POLICY, report)


def cost_difference_table(normalised: pl.DataFrame, reference: str, report: ReportParams) -> pl.DataFrame:
    """As :func:`score_difference_table` in normalised cost, for each scope."""
    return _difference_table(normalised, reference, ["model", "benchmark", "scope"], [], report)


def cost_curves(cost: pl.DataFrame) -> pl.DataFrame:
    """Cost at each budget over the best order's cost summed over all budgets, for each head.

    Returns
    -------
    model, benchmark, policy, trained_on, layer, kv_head, fraction (of cache_size that is kept), cost
    (mean over samples and cache sizes).
    """
    cache = ["model", "benchmark", "sample_id", "layer", "kv_head", "cache_size"]
    head = ["model", "benchmark", *POLICY, "layer", "kv_head", "fraction"]
    best = (
        cost.lazy()
        .filter(pl.col("budget").is_null(), pl.col("optimal_cost") > 0)
        .group_by(cache)
        .agg(pl.col("optimal_cost").first().alias("total"))
    )
    return (
        cost.lazy()
        .filter(pl.col("budget").is_not_null())
        .join(best, on=cache)
        # Budgets were rounded to whole tokens; the grid is what samples share.
        .with_columns(fraction=(pl.col("budget") * GRID / pl.col("cache_size")).round() / GRID)
        .group_by(head)
        .agg(cost=(pl.col("cost") / pl.col("total")).mean())
        .sort(head, nulls_last=True)
        .collect()
    )


def training_table(curves: pl.DataFrame) -> pl.DataFrame:
    """Training curves over heads: model, trained_on, estimator, metric, step, mean, q10, median, q90."""
    return over_heads(curves, ["model", "trained_on", "metric", "estimator", "step"]).select(
        "model", "trained_on", "estimator", "metric", "step", "mean", "q10", "median", "q90"
    )


def over_heads(curves: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """The columns ``by``, in their order, and mean, q10, median and q90 of ``value`` over all else."""
    value = pl.col("value").cast(pl.Float64)
    low, high = (value.quantile(share, "linear") for share in (0.1, 0.9))
    return curves.group_by(by).agg(mean=value.mean(), q10=low, median=value.median(), q90=high).sort(by)


def steps_table(training: pl.DataFrame) -> pl.DataFrame:
    """How soon exact gradients reach what rloo ends with.

    Curves count steps from 0; here a step is the number of updates made, so the last of 300 is 300.

    Returns
    -------
    model, trained_on, rloo_steps, rloo_cost, exact_steps (first validated step at or below rloo_cost,
    null if none), exact_cost (its last). Empty where one of the two was not trained.
    """
    validation = training.filter(pl.col("metric") == "validation_cost").sort("step")
    by = ["model", "trained_on"]
    rloo, exact = (validation.filter(pl.col("estimator") == estimator) for estimator in ("rloo", "exact"))
    last_rloo = rloo.group_by(by).agg(rloo_steps=pl.col("step").last() + 1, rloo_cost=pl.col("mean").last())
    return (
        exact.join(last_rloo, on=by)
        .group_by(by)
        .agg(
            pl.col("rloo_steps", "rloo_cost").first(),
            exact_steps=pl.col("step").filter(pl.col("mean") <= pl.col("rloo_cost")).min() + 1,
            exact_cost=pl.col("mean").sort_by("step").last(),
        )
        .sort(by)
    )


def series(frame: pl.DataFrame, styles: Styles) -> list[Pair]:
    """The (policy, trained_on) pairs of a table, in the order of legends."""
    return styles.in_order(frame.select(POLICY).unique().rows())


def select(frame: pl.DataFrame, policy: str, trained_on: str | None) -> pl.DataFrame:
    """The rows of one (policy, trained_on)."""
    return frame.filter(pl.col("policy") == policy, pl.col("trained_on").eq_missing(pl.lit(trained_on)))


@dataclass(frozen=True)
class _Block:
    """One group of comparable numbers: the same samples under several policies and budgets."""

    key: dict[str, Any]
    columns: list[dict[str, Any]]
    estimates: Floats  # (columns,)
    resampled: Floats  # (resamples, columns)
    samples: int


def _scores(evaluation: pl.DataFrame) -> pl.DataFrame:
    titles = {name: metric.title for name, metric in METRICS.items()}
    if unknown := sorted(set(evaluation["metric"]) - set(titles)):
        raise PipelineError(
            f"The results name the metric {unknown[0]}, which is not in pipeline/metrics.py; known: "
            f"{', '.join(titles)}. Run the score stage again."
        )
    return evaluation.with_columns(
        pl.col("metric").replace(titles),
        weight=pl.when(pl.col("metric") == "nll").then(pl.col("n_tokens")).otherwise(1).cast(pl.Float64),
    )


def _blocks(frame: pl.DataFrame, block: list[str], columns: list[str], report: ReportParams) -> Iterator[_Block]:
    for key, part in frame.sort(*block, *columns, "sample_id", nulls_last=True).group_by(block, maintain_order=True):
        named = dict(zip(block, key, strict=True))
        heads = part.select(columns).unique(maintain_order=True)
        samples = part.unique("sample_id").sort("sample_id")
        if part.height != heads.height * samples.height or part.n_unique([*columns, "sample_id"]) != part.height:
            raise PipelineError(
                f"The results of {', '.join(map(str, key))} do not have every sample exactly once per policy and "
                "budget; run the evaluate stage again."
            )
        values = part["value"].to_numpy().reshape(heads.height, samples.height).T  # (samples, columns)
        if not np.isfinite(values).all():
            raise PipelineError(
                f"The results of {', '.join(map(str, key))} hold a value that is not finite; run the evaluate stage "
                "again, in float32 if it persists."
            )
        weights = samples["weight"].to_numpy()  # (samples,)
        strata = samples["task"].rank("dense").cast(pl.Int64).to_numpy()  # (samples,)
        # Each block starts from the same seed: adding a model leaves the other models' intervals alone.
        counts = resampling_counts(strata, report.bootstrap_samples, np.random.default_rng(report.seed))
        estimates = weighted_means(np.ones((1, samples.height)), values, weights)
        resampled = weighted_means(counts, values, weights)
        if named.get("metric") == PERPLEXITY:
            estimates, resampled = np.exp(estimates), np.exp(resampled)
        yield _Block(named, heads.to_dicts(), estimates[0], resampled, samples.height)


def _interval_table(frame: pl.DataFrame, block: list[str], columns: list[str], report: ReportParams) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for group in _blocks(frame, block, columns, report):
        low, high = _interval(group.resampled, group.samples, report)
        rows += [
            group.key | column | {"mean": group.estimates[i], "low": low[i], "high": high[i], "samples": group.samples}
            for i, column in enumerate(group.columns)
        ]
    schema = {name: frame.schema[name] for name in (*block, *columns)}
    return pl.DataFrame(
        rows, schema=schema | dict.fromkeys(("mean", "low", "high"), pl.Float64) | {"samples": pl.Int64}
    )


def _difference_table(
    frame: pl.DataFrame, reference: str, block: list[str], at: list[str], report: ReportParams
) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for group in _blocks(frame, block, [*POLICY, *at], report):
        pairs = [
            (i, j)
            for i, ours in enumerate(group.columns)
            if ours["policy"] == reference
            for j, theirs in enumerate(group.columns)
            if _is_compared(ours, theirs) and all(ours[name] == theirs[name] for name in at)
        ]
        if not pairs:
            continue
        ours, theirs = np.array(pairs).T
        low, high = _interval(group.resampled[:, ours] - group.resampled[:, theirs], group.samples, report)
        difference = group.estimates[ours] - group.estimates[theirs]
        rows += [
            group.key
            | group.columns[i]
            | {"baseline": group.columns[j]["policy"], "baseline_trained_on": group.columns[j]["trained_on"]}
            | {"difference": difference[row], "low": low[row], "high": high[row]}
            for row, (i, j) in enumerate(pairs)
        ]
    schema = {name: frame.schema[name] for name in (*block, *POLICY, *at)}
    schema |= {"baseline": pl.String(), "baseline_trained_on": pl.String()}
    return pl.DataFrame(rows, schema=schema | dict.fromkeys(("difference", "low", "high"), pl.Float64()))


def _interval(resampled: Floats, samples: int, report: ReportParams) -> tuple[Floats, Floats]:
    """Ends of the interval of each column, not a number where a single sample says nothing of its spread."""
    if samples == 1:
        unknown = np.full(resampled.shape[1], np.nan)
        return unknown, unknown
    return percentile_interval(resampled, report.confidence)


def _is_compared(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if theirs["trained_on"] is not None:
        # The other estimators, trained on the same benchmark.
        return bool(theirs["policy"] != ours["policy"] and theirs["trained_on"] == ours["trained_on"])
    return theirs["policy"] not in (FULL.policy, ORACLE.policy)
