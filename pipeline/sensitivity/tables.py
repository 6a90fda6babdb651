"""Means and intervals of the sensitivity study, as queries over its table. It draws nothing.

Intervals are t-intervals over seeds of the mean over heads: they say how far the randomness of a training
(initial weights, draws, and which sequences a fraction keeps) moves a number. Heads and validation sequences
are the same for all seeds and not resampled.
"""

import polars as pl
from scipy.stats import t

from pipeline.sensitivity.variants import BASE

VARIANT = ["model", "trained_on", "trained_length", "corpus", "length", "axis", "value"]
# Rows about the corpus and the length that were trained on; about this corpus, at every length; about every corpus,
# at the lengths that were trained on.
SAME_CORPUS = pl.col("trained_on") == pl.col("corpus")
OWN = SAME_CORPUS & (pl.col("trained_length") == pl.col("length"))
NOT_LONGER = ~SAME_CORPUS | OWN


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
    pair = ["model", "trained_on", "corpus", "length", "seed"]
    paired = by_seed.join(base.select(*pair, base="cost"), on=pair, maintain_order="left")
    return _intervals(
        paired.with_columns(difference=pl.col("cost") - pl.col("base")),
        VARIANT,
        {"cost": ("mean", "low", "high"), "difference": ("difference", "difference_low", "difference_high")},
        confidence,
    )


def curve_table(study: pl.DataFrame, confidence: float) -> pl.DataFrame:
    """Cost during training of each estimator, on the corpus and length it is trained on (figure 5b).

    Returns
    -------
    pl.DataFrame
        ``VARIANT``, step, seeds, mean, low, high.
    """
    own = study.filter(pl.col("axis") == BASE[0], OWN)
    by_seed = own.group_by(*VARIANT, "step", "seed", maintain_order=True).agg(pl.col("cost").cast(pl.Float64).mean())
    return _intervals(by_seed, [*VARIANT, "step"], {"cost": ("mean", "low", "high")}, confidence)


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
