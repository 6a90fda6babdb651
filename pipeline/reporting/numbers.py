"""All tables of numbers of one report, made from the tables of the results. It shows none."""

from dataclasses import dataclass

import polars as pl

from pipeline.reporting import aggregate
from pipeline.reporting.run import Run


@dataclass(frozen=True)
class Numbers:
    """What figures, sentences and tables are made from (``aggregate.py`` describes the columns)."""

    scores: pl.DataFrame
    tasks: pl.DataFrame
    score_differences: pl.DataFrame
    costs: pl.DataFrame
    cost_differences: pl.DataFrame
    cost_curves: pl.DataFrame
    training: pl.DataFrame
    steps: pl.DataFrame


def make_numbers(evaluation: pl.DataFrame, cost: pl.DataFrame, curves: pl.DataFrame, run: Run) -> Numbers:
    """The numbers of a run, from its tables ``EVALUATION`` and ``COST`` and from ``read.read_curves``.

    Raises
    ------
    PipelineError
        A table lacks rows, or holds a metric that is not known.
    """
    report, reference = run.report, run.styles.reference
    normalised = aggregate.normalised_costs(cost, evaluation)
    training = aggregate.training_table(curves)
    return Numbers(
        scores=aggregate.score_table(evaluation, report),
        tasks=aggregate.task_table(evaluation, report),
        score_differences=aggregate.score_difference_table(evaluation, reference, report),
        costs=aggregate.cost_table(normalised, report),
        cost_differences=aggregate.cost_difference_table(normalised, reference, report),
        cost_curves=aggregate.cost_curves(cost),
        training=training,
        steps=aggregate.steps_table(training),
    )
