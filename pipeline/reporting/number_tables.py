"""The tables of numbers as the page shows them. It computes no number and writes no HTML."""

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from pipeline.reporting.aggregate import LOWER_IS_BETTER, SCOPES, select, series
from pipeline.reporting.findings import format_value, interval, verdict
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.run import Run
from pipeline.reporting.styles import Style, Styles
from pipeline.reporting.table import Cell, Row, Table


def number_tables(numbers: Numbers, run: Run) -> list[Table]:
    """Scores, costs, their differences, steps and tasks, for each model and benchmark."""
    styles = run.styles
    found = []
    by_metric = ["model", "benchmark", "metric"]
    for (model, benchmark, metric), part in numbers.scores.group_by(by_metric, maintain_order=True):
        title = styles.title(str(benchmark))
        found.append(_score_table(f"{title}: {metric} per budget ({model})", part, str(metric), styles))
        differences = numbers.score_differences.filter(
            pl.col("model") == model, pl.col("benchmark") == benchmark, pl.col("metric") == metric
        )
        title = f"{title}: difference in {metric} ({model})"
        found += _difference_tables(title, differences, "budget", metric in LOWER_IS_BETTER, styles)
    for (model, benchmark), part in numbers.costs.group_by("model", "benchmark", maintain_order=True):
        title = styles.title(str(benchmark))
        found.append(_cost_table(f"{title}: normalised cost, 1 = best order ({model})", part, styles))
        differences = numbers.cost_differences.filter(pl.col("model") == model, pl.col("benchmark") == benchmark)
        title = f"{title}: difference in normalised cost ({model})"
        found += _difference_tables(title, differences, "scope", True, styles)
    if not numbers.steps.is_empty():
        found.append(_steps_table(numbers.steps, styles))
    for (model, benchmark, metric), part in numbers.tasks.group_by(by_metric, maintain_order=True):
        title = f"{styles.title(str(benchmark))}: {metric} of each task, mean over budgets ({model})"
        found.append(_task_table(title, part, run.in_order(str(benchmark), part["task"].unique().to_list()), styles))
    return found


def _score_table(title: str, scores: pl.DataFrame, metric: str, styles: Styles) -> Table:
    budgets = scores["budget"].drop_nulls().unique().sort().to_list()
    rows = []
    for pair in series(scores, styles):
        line = {row["budget"]: row for row in select(scores, *pair).iter_rows(named=True)}
        # No eviction has one value, whatever the budget.
        cells = [_interval_cell(line[None] if None in line else line.get(budget), metric) for budget in budgets]
        rows.append(_policy_row(styles.style(*pair), cells))
    return Table(title, ["policy", *(f"{budget} tokens" for budget in budgets)], rows)


def _cost_table(title: str, costs: pl.DataFrame, styles: Styles) -> Table:
    scopes = [scope for scope in SCOPES if scope in costs["scope"]]
    rows = []
    for pair in series(costs, styles):
        line = {row["scope"]: row for row in select(costs, *pair).iter_rows(named=True)}
        cells = [_interval_cell(line.get(scope), "normalised_cost") for scope in scopes]
        rows.append(_policy_row(styles.style(*pair), cells))
    return Table(
        title,
        ["policy", *scopes],
        rows,
        "Future importance of evicted tokens, summed over all budgets, over the same sum for the best order. Cache "
        "sizes: in the middle of the sequence, and the whole prompt.",
    )


def _difference_tables(
    title: str, differences: pl.DataFrame, at: str, lower_is_better: bool, styles: Styles
) -> list[Table]:
    found = []
    for pair in series(differences, styles):
        part = select(differences, *pair)
        columns = (
            part["budget"].unique().sort().to_list()
            if at == "budget"
            else [scope for scope in SCOPES if scope in part["scope"]]
        )
        rivals = styles.in_order(part.select("baseline", "baseline_trained_on").unique().rows())
        rows = []
        for baseline, trained_on in rivals:
            line = {row[at]: row for row in part.filter(pl.col("baseline") == baseline).iter_rows(named=True)}
            rows.append(
                Row(
                    [
                        Cell(styles.label(baseline, trained_on)),
                        *(_difference_cell(line[c], lower_is_better) for c in columns),
                    ]
                )
            )
        header = [f"{column} tokens" if at == "budget" else str(column) for column in columns]
        found.append(
            Table(
                f"{title}: {styles.label(*pair)} minus baseline",
                ["baseline", *header],
                rows,
                "Paired on the same samples. Shaded: the interval excludes zero (green: KVP is better, orange: worse).",
            )
        )
    return found


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
        Row(
            [
                Cell(styles.title(row["trained_on"])),
                Cell(row["model"]),
                Cell(str(row["rloo_steps"])),
                Cell(f"{row['rloo_cost']:.3f}"),
                Cell("not reached" if row["exact_steps"] is None else str(row["exact_steps"])),
                Cell(f"{row['exact_cost']:.3f}"),
            ]
        )
        for row in steps.iter_rows(named=True)
    ]
    header = ["benchmark", "model", "rloo steps", "rloo final cost", "exact reaches it at step", "exact final cost"]
    note = "Normalised cost on validation sequences, mean over heads, at the steps that were validated."
    return Table("Steps until the exact gradient reaches what rloo ends with", header, rows, note)


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
