"""Percentile bootstrap over samples, vectorised. It knows arrays, not tables.

A resample is described by how often it draws each sample, so that the means of every column under
every resample are one matrix product, and columns (policies, budgets) stay paired.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def resampling_counts(strata: NDArray[np.int64], count: int, generator: np.random.Generator) -> Floats:
    """How often each of ``count`` resamples draws each sample.

    Samples are drawn with replacement within their stratum, so that each stratum keeps its size.

    Parameters
    ----------
    strata
        Stratum of each sample.  # (samples,)

    Returns
    -------
    Floats
        Counts; each row sums to the number of samples.  # (count, samples)
    """
    counts = np.zeros((count, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        share = np.full(len(members), 1 / len(members))
        counts[:, members] = generator.multinomial(len(members), share, size=count)
    return counts


def weighted_means(counts: Floats, values: Floats, weights: Floats) -> Floats:
    """Mean of each column of ``values`` under each resample, samples weighted.

    Parameters
    ----------
    counts
        From :func:`resampling_counts`, or ones for the plain mean.  # (resamples, samples)
    values
        One column for each quantity.  # (samples, columns)
    weights
        Weight of each sample, such as its tokens.  # (samples,)
    """
    means: Floats = (counts @ (values * weights[:, None])) / (counts @ weights)[:, None]  # (resamples, columns)
    return means


def percentile_interval(estimates: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Lower and upper ends of the central ``confidence`` of each column's estimates.  # (columns,) each"""
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail], axis=0)
    return low, high
