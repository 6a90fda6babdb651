"""Sentences chosen by the numbers. It claims nothing that the tables of this run do not show.

"Better" and "worse" mean that the paired interval excludes zero; anything else is called undecided.
"""

import math
from collections.abc import Callable
from typing import Any

import polars as pl

from pipeline.reporting import names, tables

BASELINE_KINDS: tuple[names.Kind, ...] = ("attention-free", "attention-based")


def headline(
    scores: pl.DataFrame,
    score_differences: pl.DataFrame,
    costs: pl.DataFrame,
    cost_differences: pl.DataFrame,
    steps: pl.DataFrame,
) -> list[str]:
    """The findings of a run, most important first."""
    found: list[str] = []
    for (model, benchmark, metric), part in scores.group_by("model", "benchmark", "metric", maintain_order=True):
        differences = score_differences.filter(
            pl.col("model") == model, pl.col("benchmark") == benchmark, pl.col("metric") == metric
        )
        found += _about_scores(str(model), str(benchmark), str(metric), part, differences)
    for (model, corpus), part in costs.filter(pl.col("scope") == "pooled").group_by(
        "model", "corpus", maintain_order=True
    ):
        differences = cost_differences.filter(
            pl.col("model") == model, pl.col("corpus") == corpus, pl.col("scope") == "pooled"
        )
        found += _about_cost(str(model), str(corpus), part, differences)
    return found + [_about_steps(row) for row in steps.iter_rows(named=True)]


def verdict(low: float, high: float, lower_is_better: bool) -> str:
    """better, worse or undecided, from the interval of "KVP minus baseline"; undecided where that is unknown."""
    if not (low > 0 or high < 0):
        return "undecided"
    return "better" if (high < 0) == lower_is_better else "worse"


def _about_scores(
    model: str, benchmark: str, metric: str, scores: pl.DataFrame, differences: pl.DataFrame
) -> list[str]:
    budgets = scores["budget"].drop_nulls().unique().sort().to_list()
    ours = _own_kvp(scores, benchmark)
    if ours is None or not budgets:
        return []
    policy, trained_on = ours
    lower = metric in names.LOWER_IS_BETTER
    where = f"On {names.corpus_title(benchmark)} ({model})"
    budget = budgets[len(budgets) // 2]
    at = scores.filter(pl.col("budget") == budget)
    sentence = f"{where}, with {budget} tokens kept per head, {_value(at, policy, trained_on, metric, 'has')}"
    for kind in BASELINE_KINDS:
        rival = _best(at, kind, lower)
        if rival is not None:
            sentence += f"; the best {kind} baseline is {_value(at, *rival, metric)}"
    ceiling = scores.filter(pl.col("policy") == "full")
    if not ceiling.is_empty():
        sentence += f"; without eviction it is {format_value(ceiling['mean'][0], metric)}"
    found = [f"{sentence}."]
    mine = tables.select(differences, policy, trained_on)
    for kind in BASELINE_KINDS:
        compared = _of_kind(mine, kind)
        if compared.is_empty():
            continue
        found.append(
            f"{where}, {_counted(compared, lower)} the {kind} baselines: {names.label(policy, trained_on)}"
            f" against {_listed(compared)} at {len(budgets)} budgets, each on the same samples."
        )
    return found + _about_estimators(where, mine, lower)


def _about_cost(model: str, corpus: str, costs: pl.DataFrame, differences: pl.DataFrame) -> list[str]:
    ours = _own_kvp(costs, corpus)
    if ours is None:
        return []
    policy, trained_on = ours
    label = names.label(policy, trained_on)
    where = f"Cost of eviction on {names.corpus_title(corpus)} ({model})"
    mine = tables.select(differences, policy, trained_on)
    sentence = f"{where}, where the best order has 1: {_value(costs, policy, trained_on, 'normalised_cost', 'has')}"
    rival = _best(costs, "attention-free", lower_is_better=True)
    if rival is not None:
        row = mine.filter(pl.col("baseline") == rival[0]).row(0, named=True)
        outcome = verdict(row["low"], row["high"], lower_is_better=True)
        sentence += (
            f"; the best attention-free baseline is {_value(costs, *rival, 'normalised_cost')}; {label} is "
            + {"better": "lower", "worse": "higher", "undecided": "not distinguishable"}[outcome]
            + f" (difference {row['difference']:+.2f}, {interval(row, '{:+.2f}'.format)})"
        )
    found = [f"{sentence}."]
    based = _of_kind(mine, "attention-based")
    if not based.is_empty():
        found.append(
            f"{where}, {_counted(based, True)} the attention-based policies: {label} against {_listed(based)}."
        )
    other = costs.filter(pl.col("policy") == policy, pl.col("trained_on") != corpus)
    here = tables.select(costs, policy, trained_on)["mean"][0]
    for row in other.iter_rows(named=True):
        found.append(
            f"{where}, transfer: trained on {names.corpus_title(row['trained_on'])} instead of "
            f"{names.corpus_title(str(trained_on))}, the policy's normalised cost is {row['mean']:.2f} instead of "
            f"{here:.2f}."
        )
    return found + _about_estimators(where, mine, True)


def _about_estimators(where: str, mine: pl.DataFrame, lower: bool) -> list[str]:
    other = mine.filter(pl.col("baseline").str.starts_with("kvp-"))
    if other.is_empty():
        return []
    policy, baseline = other["policy"][0], other["baseline"][0]
    return [
        f"{where}, {_counted(other, lower)} the other estimator: {names.label(policy, other['trained_on'][0])} "
        f"against {names.label(baseline, other['baseline_trained_on'][0])}."
    ]


def _about_steps(row: dict[str, object]) -> str:
    where = f"Training on {names.corpus_title(str(row['corpus']))} ({row['model']})"
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


def _own_kvp(frame: pl.DataFrame, corpus: str) -> tuple[str, str | None] | None:
    """The KVP trained on ``corpus`` itself, or else the first there is."""
    policy = tables.reference_policy(frame)
    trained = [pair for pair in tables.series(frame) if pair[0] == policy]
    return next((pair for pair in trained if pair[1] == corpus), trained[0] if trained else None)


def _best(frame: pl.DataFrame, kind: names.Kind, lower_is_better: bool) -> tuple[str, str | None] | None:
    rivals = frame.filter(pl.col("policy").map_elements(_is(kind), return_dtype=pl.Boolean))
    if rivals.is_empty():
        return None
    policy, trained_on = rivals.sort("mean", descending=not lower_is_better).select(tables.POLICY).row(0)
    return policy, trained_on


def _of_kind(differences: pl.DataFrame, kind: names.Kind) -> pl.DataFrame:
    return differences.filter(pl.col("baseline").map_elements(_is(kind), return_dtype=pl.Boolean))


def _is(kind: names.Kind) -> Callable[[str], bool]:
    return lambda policy: names.style(policy).kind == kind


def _listed(differences: pl.DataFrame) -> str:
    baselines = sorted(differences["baseline"].unique().to_list(), key=lambda policy: names.order(policy, None))
    return ", ".join(names.label(policy) for policy in baselines)


def _value(frame: pl.DataFrame, policy: str, trained_on: str | None, metric: str, link: str = "with") -> str:
    row = tables.select(frame, policy, trained_on).row(0, named=True)
    shown: Callable[[float], str] = lambda value: format_value(value, metric)  # noqa: E731
    mean = f"{metric.replace('_', ' ')} {shown(row['mean'])}"
    return f"{names.label(policy, trained_on)} {link} {mean} ({interval(row, shown)})"


def interval(row: dict[str, Any], shown: Callable[[float], str]) -> str:
    """The interval of a row of a table as the page prints it."""
    return "one sample" if math.isnan(row["low"]) else f"{shown(row['low'])} to {shown(row['high'])}"


def format_value(value: float, metric: str) -> str:
    """A number as the page prints it: accuracies to two digits after the point, others by their size."""
    if metric == "accuracy" or abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"
