"""Sentences chosen by the numbers. It claims nothing that the tables of this run do not show.

"Better" and "worse" mean that the paired interval excludes zero; anything else is called undecided.
"""

import math
from collections.abc import Callable
from typing import Any

import polars as pl

from pipeline.reporting.aggregate import LOWER_IS_BETTER, POLICY, select, series
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.styles import BASELINE_KINDS, Kind, Pair, Styles


def headline(numbers: Numbers, styles: Styles) -> list[str]:
    """The findings of a run, most important first."""
    found: list[str] = []
    by_metric = ["model", "benchmark", "metric"]
    for (model, benchmark, metric), part in numbers.scores.group_by(by_metric, maintain_order=True):
        differences = numbers.score_differences.filter(model=model, benchmark=benchmark, metric=metric)
        found += _about_scores(str(model), str(benchmark), str(metric), part, differences, styles)
    pooled = numbers.costs.filter(scope="pooled")
    for (model, benchmark), part in pooled.group_by("model", "benchmark", maintain_order=True):
        differences = numbers.cost_differences.filter(scope="pooled", model=model, benchmark=benchmark)
        found += _about_cost(str(model), str(benchmark), part, differences, styles)
    return found + [_about_steps(row, styles) for row in numbers.steps.iter_rows(named=True)]


def verdict(low: float, high: float, lower_is_better: bool) -> str:
    """better, worse or undecided, from the interval of "KVP minus baseline"; undecided where that is unknown."""
    if not (low > 0 or high < 0):
        return "undecided"
    return "better" if (high < 0) == lower_is_better else "worse"


def _about_scores(
    model: str, benchmark: str, metric: str, scores: pl.DataFrame, differences: pl.DataFrame, styles: Styles
) -> list[str]:
    budgets = scores["budget"].drop_nulls().unique().sort().to_list()
    ours = _own_kvp(scores, benchmark, styles)
    if ours is None or not budgets:
        return []
    policy, trained_on = ours
    lower = metric in LOWER_IS_BETTER
    where = f"On {styles.title(benchmark)} ({model})"
    budget = budgets[len(budgets) // 2]
    at = scores.filter(pl.col("budget") == budget)
    sentence = f"{where}, with {budget} tokens kept per head, {_value(at, ours, metric, styles, 'has')}"
    for kind in BASELINE_KINDS:
        rival = _best(at, styles.of_kind(kind), lower)
        if rival is not None:
            sentence += f"; the best {kind} baseline is {_value(at, rival, metric, styles)}"
    ceiling = scores.filter(pl.col("policy") == "full")
    if not ceiling.is_empty():
        sentence += f"; without eviction it is {format_value(ceiling['mean'][0], metric)}"
    found = [f"{sentence}."]
    mine = select(differences, policy, trained_on)
    for kind in BASELINE_KINDS:
        compared = _of_kind(mine, kind, styles)
        if compared.is_empty():
            continue
        found.append(
            f"{where}, {_counted(compared, lower)} the {kind} baselines: {styles.label(policy, trained_on)}"
            f" against {_listed(compared, styles)} at {len(budgets)} budgets, each on the same samples."
        )
    return found + _about_estimators(where, mine, lower, styles)


def _about_cost(
    model: str, benchmark: str, costs: pl.DataFrame, differences: pl.DataFrame, styles: Styles
) -> list[str]:
    ours = _own_kvp(costs, benchmark, styles)
    if ours is None:
        return []
    policy, trained_on = ours
    label = styles.label(policy, trained_on)
    where = f"Cost of eviction on {styles.title(benchmark)} ({model})"
    mine = select(differences, policy, trained_on)
    sentence = f"{where}, where the best order has 1: {_value(costs, ours, 'normalised_cost', styles, 'has')}"
    rival = _best(costs, styles.of_kind("attention-free"), lower_is_better=True)
    if rival is not None:
        row = mine.filter(pl.col("baseline") == rival[0]).row(0, named=True)
        outcome = verdict(row["low"], row["high"], lower_is_better=True)
        sentence += (
            f"; the best attention-free baseline is {_value(costs, rival, 'normalised_cost', styles)}; {label} is "
            + {"better": "lower", "worse": "higher", "undecided": "not distinguishable"}[outcome]
            + f" (difference {row['difference']:+.2f}, {interval(row, '{:+.2f}'.format)})"
        )
    found = [f"{sentence}."]
    based = _of_kind(mine, "attention-based", styles)
    if not based.is_empty():
        found.append(
            f"{where}, {_counted(based, True)} the attention-based policies: {label} against {_listed(based, styles)}."
        )
    other = costs.filter(pl.col("policy") == policy, pl.col("trained_on") != benchmark)
    here = select(costs, policy, trained_on)["mean"][0]
    for row in other.iter_rows(named=True):
        found.append(
            f"{where}, transfer: trained on {styles.title(row['trained_on'])} instead of "
            f"{styles.title(str(trained_on))}, the policy's normalised cost is {row['mean']:.2f} instead of "
            f"{here:.2f}."
        )
    return found + _about_estimators(where, mine, True, styles)


def _about_estimators(where: str, mine: pl.DataFrame, lower: bool, styles: Styles) -> list[str]:
    others = mine.filter(pl.col("baseline_trained_on").is_not_null())
    return [
        f"{where}, {_counted(part, lower)} the other estimator: "
        f"{styles.label(part['policy'][0], part['trained_on'][0])} against {_listed(part, styles)}."
        for _, part in others.group_by("baseline", maintain_order=True)
    ]


def _about_steps(row: dict[str, object], styles: Styles) -> str:
    where = f"Training on {styles.title(str(row['trained_on']))} ({row['model']})"
    cost = f"validation cost {row['rloo_cost']:.2f}"
    if row["exact_steps"] is None:
        return (
            f"{where}: the exact gradient did not reach what rloo ended with ({cost} after {row['rloo_steps']} steps); "
            f"it ended with {row['exact_cost']:.2f}."
        )
    return (
        f"{where}: rloo ended with {cost} after {row['rloo_steps']} steps; the exact gradient was there at step "
        f"{row['exact_steps']} and ended with {row['exact_cost']:.2f}."
    )


def _counted(differences: pl.DataFrame, lower: bool) -> str:
    outcomes = [verdict(row["low"], row["high"], lower) for row in differences.iter_rows(named=True)]
    better, worse, undecided = (outcomes.count(word) for word in ("better", "worse", "undecided"))
    total = len(outcomes)
    if better == total:
        return "KVP is better in every comparison with" if total > 1 else "KVP is better than"
    if worse == total:
        return "KVP is worse in every comparison with" if total > 1 else "KVP is worse than"
    if undecided == total:
        return "KVP cannot be told apart from"
    return f"of {total} comparisons KVP is better in {better}, worse in {worse} and undecided in {undecided}, against"


def _own_kvp(frame: pl.DataFrame, benchmark: str, styles: Styles) -> Pair | None:
    """The KVP trained on ``benchmark`` itself, or else the first there is."""
    trained = [pair for pair in series(frame, styles) if pair[0] == styles.reference]
    return next((pair for pair in trained if pair[1] == benchmark), trained[0] if trained else None)


def _best(frame: pl.DataFrame, policies: list[str], lower_is_better: bool) -> Pair | None:
    rivals = frame.filter(pl.col("policy").is_in(policies)).sort("mean", descending=not lower_is_better)
    return None if rivals.is_empty() else rivals.select(POLICY).row(0)


def _of_kind(differences: pl.DataFrame, kind: Kind, styles: Styles) -> pl.DataFrame:
    return differences.filter(pl.col("baseline").is_in(styles.of_kind(kind)))


def _listed(differences: pl.DataFrame, styles: Styles) -> str:
    baselines = differences.select("baseline", "baseline_trained_on").unique().rows()
    return ", ".join(styles.label(*pair) for pair in styles.in_order(baselines))


def _value(frame: pl.DataFrame, pair: Pair, metric: str, styles: Styles, link: str = "with") -> str:
    row = select(frame, *pair).row(0, named=True)
    shown: Callable[[float], str] = lambda value: format_value(value, metric)  # noqa: E731
    mean = f"{metric.replace('_', ' ')} {shown(row['mean'])}"
    return f"{styles.label(*pair)} {link} {mean} ({interval(row, shown)})"


def interval(row: dict[str, Any], shown: Callable[[float], str]) -> str:
    """The interval of a row of a table as the page prints it."""
    return "one sample" if math.isnan(row["low"]) else f"{shown(row['low'])} to {shown(row['high'])}"


def format_value(value: float, metric: str) -> str:
    """A number as the page prints it: accuracies to two digits after the point, others by their size."""
    if metric == "accuracy" or abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"
