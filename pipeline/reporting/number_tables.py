"""The tables of numbers as the page shows them. It computes no number and writes no HTML."""

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from pipeline.reporting.aggregate import LOWER_IS_BETTER, SCOPES, select, series
from pipeline.reporting.findings import format_value, interval, verdict
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.run import Run
from pipeline.reporting.styles import Style, Styles
from pipeline.reporting.table import Cell, Row, Table, text_table

_COST_NOTE = (
    "Future importance of evicted tokens, summed over all budgets, over the same sum for the best order. Cache sizes: "
    "in the middle of the sequence, and the whole prompt."
)


def number_tables(numbers: Numbers, run: Run) -> list[Table]:
    """Scores, costs, their differences, steps and tasks, for each model and benchmark."""
    styles = run.styles
    found = []
    by_metric = ["model", "benchmark", "metric"]
    for (model, benchmark, metric), part in numbers.scores.group_by(by_metric, maintain_order=True):
        title = styles.title(str(benchmark))
        found.append(_value_table(f"{title}: {metric} per budget ({model})", part, "budget", str(metric), styles))
        differences = numbers.score_differences.filter(model=model, benchmark=benchmark, metric=metric)
        title = f"{title}: difference in {metric} ({model})"
        found += _difference_tables(title, differences, "budget", metric in LOWER_IS_BETTER, styles)
    for (model, benchmark), part in numbers.costs.group_by("model", "benchmark", maintain_order=True):
        title = styles.title(str(benchmark))
        cost_title = f"{title}: normalised cost, 1 = best order ({model})"
        found.append(_value_table(cost_title, part, "scope", "normalised_cost", styles, _COST_NOTE))
        differences = numbers.cost_differences.filter(model=model, benchmark=benchmark)
        title = f"{title}: difference in normalised cost ({model})"
        found += _difference_tables(title, differences, "scope", True, styles)
    if not numbers.steps.is_empty():
        found.append(_steps_table(numbers.steps, styles))
    for (model, benchmark, metric), part in numbers.tasks.group_by(by_metric, maintain_order=True):
        title = f"{styles.title(str(benchmark))}: {metric} of each task, mean over budgets ({model})"
        found.append(_task_table(title, part, run.in_order(str(benchmark), part["task"].unique().to_list()), styles))
    return found


def _value_table(title: str, values: pl.DataFrame, at: str, metric: str, styles: Styles, note: str = "") -> Table:
    columns = _columns(values, at)
    rows = []
    for pair in series(values, styles):
        line = {row[at]: row for row in select(values, *pair).iter_rows(named=True)}
        # No eviction has one value, whatever the budget.
        cells = [_interval_cell(line.get(None, line.get(column)), metric) for column in columns]
        rows.append(_policy_row(styles.style(*pair), cells))
    return Table(title, ["policy", *columns.values()], rows, note)


def _difference_tables(
    title: str, differences: pl.DataFrame, at: str, lower_is_better: bool, styles: Styles
) -> list[Table]:
    found = []
    for pair in series(differences, styles):
        part = select(differences, *pair)
        columns = _columns(part, at)
        rows = []
        for baseline, trained_on in styles.in_order(part.select("baseline", "baseline_trained_on").unique().rows()):
            line = {row[at]: row for row in part.filter(baseline=baseline).iter_rows(named=True)}
            cells = [_difference_cell(line[column], lower_is_better) for column in columns]
            rows.append(Row([Cell(styles.label(baseline, trained_on)), *cells]))
        found.append(
            Table(
                f"{title}: {styles.label(*pair)} minus baseline",
                ["baseline", *columns.values()],
                rows,
                "Paired on the same samples. Shaded: the interval excludes zero (green: KVP is better, orange: worse).",
            )
        )
    return found


def _columns(frame: pl.DataFrame, at: str) -> dict[Any, str]:
    """The values of ``at`` that become columns, with their headings: budgets or scopes."""
    if at == "budget":
        return {budget: f"{budget} tokens" for budget in frame[at].drop_nulls().unique().sort().to_list()}
    return {scope: scope for scope in SCOPES if scope in frame[at]}


def _task_table(title: str, tasks: pl.DataFrame, order: Sequence[str], styles: Styles) -> Table:
    metric = str(tasks["metric"][0])
    rows = []
    for pair in series(tasks, styles):
        means = dict(select(tasks, *pair).group_by("task").agg(pl.col("mean").mean()).iter_rows())
        cells = [Cell(format_value(means[task], metric)) for task in order]
        rows.append(_policy_row(styles.style(*pair), cells))
    note = "Few samples per task: read rows, not single cells. Values per budget are in figure 13."
    return Table(title, ["policy", *order], rows, note)


def _steps_table(steps: pl.DataFrame, styles: Styles) -> Table:
    rows = [
        (
            styles.title(row["trained_on"]),
            row["model"],
            str(row["rloo_steps"]),
            f"{row['rloo_cost']:.3f}",
            "not reached" if row["exact_steps"] is None else str(row["exact_steps"]),
            f"{row['exact_cost']:.3f}",
        )
        for row in steps.iter_rows(named=True)
    ]
    header = ["benchmark", "model", "rloo steps", "rloo final cost", "exact reaches it at step", "exact final cost"]
    note = "Normalised cost on validation sequences, mean over heads, at the steps that were validated."
    return text_table("Steps until the exact gradient reaches what rloo ends with", header, rows, note=note)


def _policy_row(look: Style, cells: list[Cell]) -> Row:
    return Row([Cell(look.label), *cells], ours=look.kind == "kvp")


def _interval_cell(row: dict[str, Any] | None, metric: str) -> Cell:
    if row is None:
        return Cell("")
    shown: Callable[[float], str] = lambda value: format_value(value, metric)  # noqa: E731
    return Cell(shown(row["mean"]), interval(row, shown))


def _difference_cell(row: dict[str, Any], lower_is_better: bool) -> Cell:
    outcome = verdict(row["low"], row["high"], lower_is_better)
    look = "" if outcome == "undecided" else outcome
    return Cell(f"{row['difference']:+.2f}", interval(row, "{:+.2f}".format), look)
