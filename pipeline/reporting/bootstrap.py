"""Percentile bootstrap over samples, vectorised. It knows arrays, not tables.

A resample is described by how often it draws each sample, so that the means of every column under
every resample are one matrix product, and columns (policies, budgets) stay paired.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def resampling_counts(strata: NDArray[np.int64], count: int, generator: np.random.Generator) -> Floats:
    """How often each of ``count`` resamples draws each sample.

    Samples are drawn with replacement within their stratum, so that each stratum keeps its weight. Of n samples n - 1
    are drawn and count n / (n - 1) times each (Rao and Wu, "Resampling inference with complex survey data", 1988):
    drawing n would make intervals too narrow, by a factor of sqrt(1 - 1 / n), which matters at three samples a task.
    Strata of one sample are drawn from together, since one sample says nothing of its stratum's spread.

    Parameters
    ----------
    strata
        Stratum of each sample.  # (samples,)

    Returns
    -------
    Counts; each row sums to the number of samples.  # (count, samples)
    """
    names, sizes = np.unique(strata, return_counts=True)
    alone = np.isin(strata, names[sizes == 1])
    groups = [np.flatnonzero(strata == name) for name in names[sizes > 1]]
    if alone.sum() == 1 and groups:
        # A last one that is left by itself joins the smallest group.
        groups.sort(key=len)
        groups[0] = np.append(groups[0], np.flatnonzero(alone))
    elif alone.any():
        groups.append(np.flatnonzero(alone))
    counts = np.ones((count, len(strata)))
    for members in groups:
        if (size := len(members)) > 1:
            drawn = generator.multinomial(size - 1, np.full(size, 1 / size), size=count)
            counts[:, members] = drawn * (size / (size - 1))
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
