import numpy as np
from scipy import stats

from pipeline.reporting.bootstrap import percentile_interval, resampling_counts, weighted_means


def test_counts_keep_the_size_of_every_stratum() -> None:
    strata = np.array([0, 0, 0, 1, 1, 2])
    counts = resampling_counts(strata, 500, np.random.default_rng(0))
    for stratum, size in ((0, 3), (1, 2), (2, 1)):
        assert (counts[:, strata == stratum].sum(axis=1) == size).all()


def test_counts_draw_every_sample_equally_often() -> None:
    counts = resampling_counts(np.zeros(5, dtype=np.int64), 20_000, np.random.default_rng(0))
    # Binomial(5, 1/5): mean 1, variance 0.8; five standard errors.
    assert np.abs(counts.mean(axis=0) - 1).max() < 5 * np.sqrt(0.8 / 20_000)


def test_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).lognormal(size=40)
    counts = resampling_counts(np.zeros(40, dtype=np.int64), 50_000, np.random.default_rng(2))
    low, high = percentile_interval(weighted_means(counts, values[:, None], np.ones(40)), 0.95)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="percentile", confidence_level=0.95, rng=np.random.default_rng(3)
    ).confidence_interval
    width = reference.high - reference.low
    # Two bootstraps of 50,000 differ by about one hundredth of the width.
    assert abs(low[0] - reference.low) < 0.03 * width
    assert abs(high[0] - reference.high) < 0.03 * width


def test_weighted_means_are_those_of_the_repeated_samples() -> None:
    generator = np.random.default_rng(4)
    values, weights = generator.normal(size=(6, 3)), generator.uniform(1, 9, 6)
    counts = resampling_counts(np.array([0, 0, 0, 0, 1, 1]), 20, generator)
    means = weighted_means(counts, values, weights)
    for row, mean in zip(counts.astype(int), means, strict=True):
        drawn = np.repeat(np.arange(6), row)
        np.testing.assert_allclose(mean, np.average(values[drawn], axis=0, weights=weights[drawn]))
