"""Every number that is shown, as queries over the result tables. It draws nothing and writes nothing.

Intervals come from resampling samples (stratified by task), never heads or tokens: heads of one
sample are not independent, so they are averaged first. The ends of the interval of a single sample are not a number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import PipelineError
from pipeline.params import MatrixParams, ReportParams
from pipeline.reporting import names
from pipeline.reporting.bootstrap import Floats, percentile_interval, resampling_counts, weighted_means

EVALUATION_COLUMNS = (
    "model", "policy", "trained_on", "benchmark", "task", "sample_id", "budget", "metric", "value", "n_tokens",
)  # fmt: skip
COST_COLUMNS = (
    "model", "policy", "trained_on", "corpus", "sample_id", "layer", "kv_head", "cache_size", "budget", "cost",
    "optimal_cost",
)  # fmt: skip
CURVE_COLUMNS = ("step", "layer", "kv_head", "metric", "value")
# The numbers of these tables that are averaged, and what tells their rows apart: an average hides one that is none.
_AVERAGED = {
    EVALUATION_COLUMNS: (("value", "n_tokens"), ("policy", "trained_on", "budget", "benchmark", "sample_id")),
    COST_COLUMNS: (("cache_size", "cost", "optimal_cost"), ("policy", "trained_on", "corpus", "sample_id")),
    CURVE_COLUMNS: (("value",), ("metric", "step", "layer", "kv_head")),
}

POLICY = ["policy", "trained_on"]
# Budgets of the cost table lie on this grid of cache_size.
FRACTIONS = 16
# MMLU has 57 subjects: a table or a figure of so many columns cannot be read.
MOST_TASKS = 20
SCOPES = ("pooled", "mid-sequence", "whole prompt")


def read_table(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """A Parquet file's ``columns``.

    Raises
    ------
    PipelineError
        The file is missing or damaged, lacks a column, or holds what is no finite number where numbers are averaged.
    """
    if not path.is_file():
        raise PipelineError(f"{path} does not exist; run the stage that makes it (dvc repro does).")
    try:
        frame = pl.scan_parquet(path)
        missing = sorted(set(columns) - set(frame.collect_schema().names()))
        if missing:
            raise PipelineError(f"{path} lacks the columns {', '.join(missing)}; run the stage that makes it again.")
        table = frame.select(columns).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); run the stage that makes it again.") from None
    numbers, names_of_row = _AVERAGED.get(tuple(columns), ((), ()))
    for name in numbers:
        if not table.schema[name].is_numeric():
            raise PipelineError(
                f"{path}: its column {name} is {table.schema[name]} and no number; run the stage that makes it again."
            )
        bad = table.filter(pl.col(name).is_null() | ~pl.col(name).cast(pl.Float64).is_finite())
        if not bad.is_empty():
            row = bad.row(0, named=True)
            where = ", ".join(f"{column} {row[column]}" for column in names_of_row if row[column] is not None)
            raise PipelineError(
                f"{path}: {name} is not finite but {row[name]} for {where}; run the stage that makes it again, in "
                "float32 if it persists."
            )
    return table


def read_evaluations(root: Path, matrix: MatrixParams) -> pl.DataFrame:
    """The evaluation tables of the matrix, one below the other.

    Only listed entries are read: a directory left over from a dropped corpus must not reach a report.
    """
    return _read_matrix(root, matrix, "evaluation.parquet", EVALUATION_COLUMNS)


def read_costs(root: Path, matrix: MatrixParams) -> pl.DataFrame:
    """The cost tables of the matrix, one below the other."""
    return _read_matrix(root, matrix, "cost.parquet", COST_COLUMNS)


def read_curves(root: Path, matrix: MatrixParams) -> pl.DataFrame:
    """Training curves of all policies of the matrix, with the columns model, corpus and estimator added."""
    return pl.concat(
        read_table(root / model / corpus / estimator / "curves.parquet", CURVE_COLUMNS).select(
            pl.lit(model).alias("model"),
            pl.lit(corpus).alias("corpus"),
            pl.lit(estimator).alias("estimator"),
            pl.all(),
        )
        for model in matrix.model
        for corpus in matrix.corpus
        for estimator in matrix.estimator
    )


def score_table(evaluation: pl.DataFrame, report: ReportParams) -> pl.DataFrame:
    """Accuracy and perplexity of each policy at each budget.

    Returns
    -------
    pl.DataFrame
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


def score_difference_table(evaluation: pl.DataFrame, report: ReportParams) -> pl.DataFrame:
    """KVP minus each other policy on the same samples, at each budget.

    Returns
    -------
    pl.DataFrame
        model, benchmark, metric, policy, trained_on, baseline, baseline_trained_on, budget, difference,
        low, high.
    """
    return _difference_table(_scores(evaluation), ["model", "benchmark", "metric"], ["budget"], report)


def normalised_costs(cost: pl.DataFrame, evaluation: pl.DataFrame) -> pl.DataFrame:
    """Normalised cost of each sample: cost over the best order's cost, averaged over heads.

    Returns
    -------
    pl.DataFrame
        model, corpus, scope (one of ``SCOPES``), policy, trained_on, sample_id, task, value, weight.
        The whole prompt is a sample's largest cache; pooled is the mean over its cache sizes.
    """
    sample = ["model", "corpus", "sample_id"]
    tasks = evaluation.select("model", pl.col("benchmark").alias("corpus"), "sample_id", "task").unique()
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
    """Mean and interval of :func:`normalised_costs` for each model, corpus, scope and policy."""
    return _interval_table(normalised, ["model", "corpus", "scope"], POLICY, report)


def cost_difference_table(normalised: pl.DataFrame, report: ReportParams) -> pl.DataFrame:
    """KVP minus each other policy in normalised cost, on the same samples."""
    return _difference_table(normalised, ["model", "corpus", "scope"], [], report)


def cost_curves(cost: pl.DataFrame) -> pl.DataFrame:
    """Cost at each budget over the best order's cost summed over all budgets, for each head.

    Returns
    -------
    pl.DataFrame
        model, corpus, policy, trained_on, layer, kv_head, fraction (of cache_size that is kept), cost
        (mean over samples and cache sizes).
    """
    cache = ["model", "corpus", "sample_id", "layer", "kv_head", "cache_size"]
    head = ["model", "corpus", *POLICY, "layer", "kv_head", "fraction"]
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
        .with_columns(fraction=(pl.col("budget") * FRACTIONS / pl.col("cache_size")).round() / FRACTIONS)
        .group_by(head)
        .agg(cost=(pl.col("cost") / pl.col("total")).mean())
        .sort(head, nulls_last=True)
        .collect()
    )


def training_table(curves: pl.DataFrame) -> pl.DataFrame:
    """Training curves over heads: model, corpus, estimator, metric, step, mean, q10, median, q90."""
    value = pl.col("value").cast(pl.Float64)
    return (
        curves.group_by("model", "corpus", "estimator", "metric", "step")
        .agg(
            mean=value.mean(),
            q10=value.quantile(0.1, "linear"),
            median=value.median(),
            q90=value.quantile(0.9, "linear"),
        )
        .sort("model", "corpus", "metric", "estimator", "step")
    )


def steps_table(training: pl.DataFrame) -> pl.DataFrame:
    """How soon exact gradients reach what rloo ends with.

    Curves count steps from 0; here a step is the number of updates made, so the last of 300 is 300.

    Returns
    -------
    pl.DataFrame
        model, corpus, rloo_steps, rloo_cost, exact_steps (first validated step at or below rloo_cost,
        null if none), exact_cost (its last). Empty where one of the two was not trained.
    """
    validation = training.filter(pl.col("metric") == "validation_cost").sort("step")
    by = ["model", "corpus"]
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


def prompt_table(paths: dict[tuple[str, str], Path]) -> pl.DataFrame:
    """Samples and prompt lengths of each task, from the sample files of (model, corpus)."""
    frames = [
        read_table(path, ("task", "prompt_len"))
        .group_by("task", maintain_order=True)
        .agg(
            samples=pl.len(),
            mean_tokens=pl.col("prompt_len").mean(),
            min_tokens=pl.col("prompt_len").min(),
            max_tokens=pl.col("prompt_len").max(),
        )
        .select(pl.lit(model).alias("model"), pl.lit(corpus).alias("corpus"), pl.all())
        for (model, corpus), path in paths.items()
    ]
    return pl.concat(frames) if frames else pl.DataFrame()


def series(frame: pl.DataFrame) -> list[tuple[str, str | None]]:
    """The (policy, trained_on) pairs of a table, in the order of legends."""
    pairs = frame.select(POLICY).unique().rows()
    return sorted(pairs, key=lambda pair: names.order(*pair))


def select(frame: pl.DataFrame, policy: str, trained_on: str | None) -> pl.DataFrame:
    """The rows of one (policy, trained_on)."""
    return frame.filter(pl.col("policy") == policy, pl.col("trained_on").eq_missing(pl.lit(trained_on)))


def reference_policy(frame: pl.DataFrame) -> str:
    """The KVP that comparisons are about: the exact one where it was trained."""
    return "kvp-exact" if "kvp-exact" in frame["policy"] else "kvp-rloo"


@dataclass(frozen=True)
class _Block:
    """One group of comparable numbers: the same samples under several policies and budgets."""

    key: dict[str, Any]
    columns: list[dict[str, Any]]
    estimates: Floats  # (columns,)
    resampled: Floats  # (resamples, columns)
    samples: int


def _read_matrix(root: Path, matrix: MatrixParams, file: str, columns: Sequence[str]) -> pl.DataFrame:
    return pl.concat(
        (read_table(root / model / name / file, columns) for model in matrix.model for name in matrix.benchmark),
        how="vertical_relaxed",
    )


def _scores(evaluation: pl.DataFrame) -> pl.DataFrame:
    pooled = pl.col("metric") == "nll"
    return evaluation.with_columns(
        pl.col("metric").replace(names.SHOWN_METRICS),
        weight=pl.when(pooled).then(pl.col("n_tokens")).otherwise(1).cast(pl.Float64),
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
        if named.get("metric") == "perplexity":
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


def _difference_table(frame: pl.DataFrame, block: list[str], at: list[str], report: ReportParams) -> pl.DataFrame:
    reference = reference_policy(frame)
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
    kind = names.style(theirs["policy"]).kind
    if kind == "kvp":
        # The other estimator, trained on the same corpus.
        return bool(theirs["policy"] != ours["policy"] and theirs["trained_on"] == ours["trained_on"])
    return kind in ("attention-free", "attention-based")
