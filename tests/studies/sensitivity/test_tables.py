"""Means and intervals against a literal computation from made-up costs."""

import math
import statistics

import polars as pl
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from studies.sensitivity.columns import STUDY_COLUMNS
from studies.sensitivity.tables import NOT_LONGER, OWN, SAME_BENCHMARK, curve_table, summary_table, titled

# Cost of the two heads for each seed.
EXACT = [(2.0, 2.2), (2.1, 2.5), (1.9, 2.0)]
RLOO = [(2.3, 2.2), (2.3, 2.6), (2.0, 2.3)]


def make_study() -> pl.DataFrame:
    rows = []
    for value, costs in (("exact", EXACT), ("rloo", RLOO)):
        for seed, heads in enumerate(costs):
            for kv_head, cost in enumerate(heads):
                one = ("estimator", value, seed, "tiny", "ruler", 512)
                rows.append((*one, "ruler", 512, 1, 0, kv_head, cost + 3))
                rows.append((*one, "ruler", 512, 60, 0, kv_head, cost))
                rows.append((*one, "dialogues", 512, 60, 0, kv_head, cost + 1))
                rows.append((*one, "ruler", 1024, 60, 0, kv_head, 2 * cost))
    return pl.DataFrame(rows, schema=list(STUDY_COLUMNS), orient="row")


def test_the_summary_is_the_t_interval_over_seeds_of_the_mean_over_heads() -> None:
    summary = summary_table(make_study(), 0.9)
    row = summary.filter(value="rloo", benchmark="ruler", length=512).row(0, named=True)
    exact, rloo = ([statistics.fmean(heads) for heads in costs] for costs in (EXACT, RLOO))
    assert row["seeds"] == 3
    assert row["mean"] == pytest.approx(statistics.fmean(rloo))
    assert (row["low"], row["high"]) == pytest.approx(tuple(ttest_1samp(rloo, 0).confidence_interval(0.9)))
    assert row["difference"] == pytest.approx(statistics.fmean(rloo) - statistics.fmean(exact))
    interval = tuple(ttest_rel(rloo, exact).confidence_interval(0.9))
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(interval)


def test_the_base_does_not_differ_from_itself_and_each_transfer_is_separate() -> None:
    summary = summary_table(make_study(), 0.95)
    assert summary.height == 6
    for row in summary.filter(value="exact").iter_rows(named=True):
        assert row["difference"] == row["difference_low"] == row["difference_high"] == 0
    own, other, longer = (
        summary.filter(value="rloo", benchmark=benchmark, length=length).row(0, named=True)
        for benchmark, length in (("ruler", 512), ("dialogues", 512), ("ruler", 1024))
    )
    assert other["mean"] == pytest.approx(own["mean"] + 1)
    assert other["difference"] == pytest.approx(own["difference"])
    assert longer["difference"] == pytest.approx(2 * own["difference"])  # from the base on the longer sequences


def test_rows_are_told_apart_by_benchmark_and_length() -> None:
    summary = (
        summary_table(make_study(), 0.95)
        .filter(value="exact")
        .select("benchmark", "length", "trained_on", "trained_length")
    )
    assert summary.filter(OWN).select("benchmark", "length").rows() == [("ruler", 512)]
    assert set(summary.filter(SAME_BENCHMARK)["length"]) == {512, 1024}
    assert set(summary.filter(NOT_LONGER).select("benchmark", "length").rows()) == {("ruler", 512), ("dialogues", 512)}


def test_curves_have_every_step_of_the_own_benchmark() -> None:
    curves = curve_table(make_study(), 0.95)
    assert curves.select("value", "step").rows() == [("exact", 1), ("exact", 60), ("rloo", 1), ("rloo", 60)]
    for row in curves.iter_rows(named=True):
        assert row["low"] < row["mean"] < row["high"]
        assert math.isclose(row["mean"] - row["low"], row["high"] - row["mean"], rel_tol=1e-9)


def test_titles_replace_names_and_keep_what_is_the_same() -> None:
    summary = summary_table(make_study(), 0.95)
    shown = titled(summary, {"ruler": "RULER", "boolq": "BoolQ"})
    assert shown["trained_on"].unique().to_list() == ["RULER"]
    assert set(shown["benchmark"]) == {"RULER", "dialogues"}
    assert shown.filter(OWN).height == summary.filter(OWN).height
