import numpy as np
from scipy import stats

from pipeline.reporting.bootstrap import percentile_interval, resampling_counts, weighted_means


def test_counts_keep_the_weight_of_every_stratum() -> None:
    strata = np.array([0, 0, 0, 1, 1, 2, 3])
    counts = resampling_counts(strata, 500, np.random.default_rng(0))
    # Strata 2 and 3 have one sample each, and are drawn from together.
    for members, size in (([0, 1, 2], 3), ([3, 4], 2), ([5, 6], 2)):
        np.testing.assert_allclose(counts[:, members].sum(axis=1), size)
        assert (counts[:, members].std(axis=0) > 0).all()


def test_a_single_sample_left_over_joins_the_smallest_stratum() -> None:
    counts = resampling_counts(np.array([0, 0, 0, 1, 2, 2]), 500, np.random.default_rng(0))
    np.testing.assert_allclose(counts[:, [3, 4, 5]].sum(axis=1), 3)
    assert (counts.std(axis=0) > 0).all()
    assert (resampling_counts(np.array([7]), 5, np.random.default_rng(0)) == 1).all()


def test_the_variance_of_a_stratified_mean_is_not_too_small() -> None:
    strata = np.repeat(np.arange(13), 3)
    values = np.random.default_rng(5).normal(size=39) + strata
    counts = resampling_counts(strata, 100_000, np.random.default_rng(6))
    found = weighted_means(counts, values[:, None], np.ones(39)).var()
    # The textbook's: each stratum has a third of its unbiased variance, and 1/13 of the weight.
    expected = np.mean([values[strata == stratum].var(ddof=1) for stratum in range(13)]) / 3 / 13
    # Five standard errors of a variance of 100,000 nearly normal draws.
    assert abs(found / expected - 1) < 5 * np.sqrt(2 / 100_000)


def test_counts_draw_every_sample_equally_often() -> None:
    counts = resampling_counts(np.zeros(5, dtype=np.int64), 20_000, np.random.default_rng(0))
    # 5/4 of Binomial(4, 1/5): mean 1, variance 1; five standard errors.
    assert np.abs(counts.mean(axis=0) - 1).max() < 5 * np.sqrt(1 / 20_000)


def test_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).lognormal(size=40)
    counts = resampling_counts(np.zeros(40, dtype=np.int64), 50_000, np.random.default_rng(2))
    low, high = percentile_interval(weighted_means(counts, values[:, None], np.ones(40)), 0.95)
    # Ours spreads by sqrt(40 / 39) more about the mean.
    low, high = (values.mean() + (end - values.mean()) * np.sqrt(39 / 40) for end in (low, high))
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="percentile", confidence_level=0.95, rng=np.random.default_rng(3)
    ).confidence_interval
    width = reference.high - reference.low
    # Two bootstraps of 50,000 differ by about one hundredth of the width.
    assert abs(low[0] - reference.low) < 0.03 * width
    assert abs(high[0] - reference.high) < 0.03 * width


def test_weighted_means_are_those_of_the_counted_samples() -> None:
    generator = np.random.default_rng(4)
    values, weights = generator.normal(size=(6, 3)), generator.uniform(1, 9, 6)
    counts = resampling_counts(np.array([0, 0, 0, 0, 1, 1]), 20, generator)
    means = weighted_means(counts, values, weights)
    for row, mean in zip(counts, means, strict=True):
        np.testing.assert_allclose(mean, np.average(values, axis=0, weights=row * weights))
