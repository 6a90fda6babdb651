"""Means and intervals of the sensitivity study, as queries over its table. It draws nothing.

Intervals are t-intervals over seeds of the mean over heads: they say how far the randomness of a training
(initial weights, draws, and which sequences a fraction keeps) moves a number. Heads and validation sequences
are the same for all seeds and not resampled.
"""

from collections.abc import Mapping

import polars as pl
from scipy.stats import t

from studies.sensitivity.columns import BASE

VARIANT = ["model", "trained_on", "trained_length", "benchmark", "length", "axis", "value"]
# Rows about the benchmark that was trained on, at every length; about this benchmark at the length that was trained on;
# about every benchmark, at the lengths that were trained on.
SAME_BENCHMARK = pl.col("trained_on") == pl.col("benchmark")
OWN = SAME_BENCHMARK & (pl.col("trained_length") == pl.col("length"))
NOT_LONGER = ~SAME_BENCHMARK | OWN


def summary_table(study: pl.DataFrame, confidence: float) -> pl.DataFrame:
    """Cost at the end of training, and its difference from the base variant with the same seed.

    Parameters
    ----------
    study
        What ``study.run_study`` returns.
    confidence
        Of the intervals, in (0, 1).

    Returns
    -------
    pl.DataFrame
        ``VARIANT``, seeds, mean, low, high, difference, difference_low, difference_high; in the order of the
        study. Differences are from the base variant on the same sequences.
    """
    training = ["model", "trained_on", "axis", "value", "seed"]
    final = study.filter(pl.col("step") == pl.col("step").max().over(training))
    by_seed = final.group_by(*VARIANT, "seed", maintain_order=True).agg(pl.col("cost").cast(pl.Float64).mean())
    axis, value = BASE
    base = by_seed.filter(pl.col("axis") == axis, pl.col("value") == value)
    pair = ["model", "trained_on", "benchmark", "length", "seed"]
    paired = by_seed.join(base.select(*pair, base="cost"), on=pair, maintain_order="left")
    return _intervals(
        paired.with_columns(difference=pl.col("cost") - pl.col("base")),
        VARIANT,
        {"cost": ("mean", "low", "high"), "difference": ("difference", "difference_low", "difference_high")},
        confidence,
    )


def curve_table(study: pl.DataFrame, confidence: float) -> pl.DataFrame:
    """Cost during training of each estimator, on the benchmark and length it is trained on (figure 5b).

    Returns
    -------
    pl.DataFrame
        ``VARIANT``, step, seeds, mean, low, high.
    """
    own = study.filter(pl.col("axis") == BASE[0], OWN)
    by_seed = own.group_by(*VARIANT, "step", "seed", maintain_order=True).agg(pl.col("cost").cast(pl.Float64).mean())
    return _intervals(by_seed, [*VARIANT, "step"], {"cost": ("mean", "low", "high")}, confidence)


def titled(table: pl.DataFrame, titles: Mapping[str, str]) -> pl.DataFrame:
    """A table of this file with what a reader sees for its benchmarks in place of their names."""
    return table.with_columns(pl.col("trained_on", "benchmark").replace(titles))


def _intervals(
    by_seed: pl.DataFrame, keys: list[str], columns: dict[str, tuple[str, str, str]], confidence: float
) -> pl.DataFrame:
    grouped = by_seed.group_by(keys, maintain_order=True).agg(
        pl.len().alias("seeds"),
        *(pl.col(column).mean().alias(names[0]) for column, names in columns.items()),
        *((pl.col(column).std() / pl.len().sqrt()).alias(f"{column} error") for column in columns),
    )
    quantile = pl.Series("quantile", t.ppf((1 + confidence) / 2, grouped["seeds"].to_numpy() - 1))
    for column, (mean, low, high) in columns.items():
        half = quantile * grouped[f"{column} error"]
        grouped = grouped.with_columns((grouped[mean] - half).alias(low), (grouped[mean] + half).alias(high))
    return grouped.select(*keys, "seeds", *(name for names in columns.values() for name in names))
