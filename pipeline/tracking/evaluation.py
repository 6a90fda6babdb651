"""The evaluation of each model in MLflow: a run for the model, and a run for each policy beside it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from pipeline.files import hash_file
from pipeline.metrics import METRICS
from pipeline.reporting.aggregate import cost_table, normalised_costs, score_table, select, series
from pipeline.reporting.read import read_table
from pipeline.reporting.styles import Styles
from pipeline.tables import COST, EVALUATION
from pipeline.tracking import runs
from pipeline.tracking.experiments import EVALUATIONS, open_experiment
from pipeline.tracking.store import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.params import Params


def log_evaluation(results: Path, reports: Path, params: "Params") -> list[str]:
    """Log the evaluation of each model: a run for the model, and beside it a run for each policy.

    Metrics are logged with step = budget, so that MLflow's charts draw them against the budget. They are means:
    MLflow draws no intervals, which are in the tables of the model's run.

    Parameters
    ----------
    results
        Directory of evaluation.parquet and cost.parquet.
    reports
        Directory of the report; its files become artifacts of the models' runs where it exists.

    Returns
    -------
    Ids of the models' runs, one for each model of the matrix.
    """
    evaluation = read_table(results / "evaluation.parquet", EVALUATION)
    cost = read_table(results / "cost.parquet", COST)
    files = hash_file(results / "evaluation.parquet") + hash_file(results / "cost.parquet")
    parents = []
    with connect() as client:
        shown = (*EVALUATIONS.columns, *_columns(evaluation, params))
        experiment = open_experiment(client, replace(EVALUATIONS, columns=shown))
        for model in params.matrix.model:
            fingerprint = runs.hash_of(
                {"files": files, "model": model, "report": params.report.model_dump(mode="json")}
            )
            parent = runs.complete_run(client, experiment, "evaluation", fingerprint)
            if parent is None:
                # Of an evaluation that was interrupted, or deleted.
                runs.delete_runs(client, experiment, f"tags.fingerprint = '{fingerprint}' and tags.role = 'policy'")
                ours = (evaluation.filter(model=model), cost.filter(model=model))
                parent = _log_model_evaluation(client, experiment, fingerprint, ours, reports, params)
            parents.append(parent)
    return parents


def _log_model_evaluation(
    client: "MlflowClient",
    experiment: str,
    fingerprint: str,
    frames: tuple[pl.DataFrame, pl.DataFrame],
    reports: Path,
    params: "Params",
) -> str:
    evaluation, cost = frames
    scores = score_table(evaluation, params.report)
    costs = cost_table(normalised_costs(cost, evaluation), params.report)
    model = str(evaluation["model"].first())
    tags = runs.origin_tags() | {"role": "evaluation", "fingerprint": fingerprint, "model": model}
    benchmarks = ", ".join(params.matrix.benchmark)
    parent = runs.start(client, experiment, f"{model} on {benchmarks}, budget sweep", tags)
    sweep = params.evaluation.model_dump(mode="json") | {"benchmarks": benchmarks}
    runs.log(client, parent, [], params=sweep | {"params_hash": runs.hash_of(sweep)})
    client.log_table(parent, scores.to_dict(as_series=False), "scores.json")
    client.log_table(parent, costs.to_dict(as_series=False), "normalised_cost.json")
    for place, (policy, trained_on) in enumerate(series(scores, Styles.of(params))):
        name = f"{policy} trained on {trained_on}" if trained_on else policy
        identity = {"model": model, "policy": policy, "trained_on": trained_on or "none"}
        tags = identity | {"role": "policy", "part_of": parent, "fingerprint": fingerprint} | runs.colour(place)
        child = runs.start(client, experiment, name, tags)
        points = _score_points(select(scores, policy, trained_on), params)
        pooled = select(costs, policy, trained_on).filter(scope="pooled")
        points += [(f"{row['benchmark']}_normalised_cost", row["mean"], 0) for row in pooled.iter_rows(named=True)]
        runs.log(client, child, points, params=identity)
        client.set_terminated(child)
    if reports.is_dir():
        client.log_artifacts(parent, str(reports), "report")
    runs.finish(client, parent)
    return parent


def _score_points(scores: pl.DataFrame, params: "Params") -> list[tuple[str, float, int]]:
    points = []
    for row in scores.iter_rows(named=True):
        # No budget means no eviction: the same value at every budget draws the ceiling as a line.
        steps = params.budgets(row["benchmark"]) if row["budget"] is None else [row["budget"]]
        metric = f"{row['benchmark']}_{row['metric']}"
        points += [(metric, row["mean"], step) for step in steps]
        if (budget := _headline_budget(row["benchmark"], params)) in steps:
            points.append((f"{metric}_at_{budget}", row["mean"], 0))
    return points


def _headline_budget(benchmark: str, params: "Params") -> int:
    """The budget whose scores stand in the list of runs: the middle one, as in the report."""
    budgets = params.budgets(benchmark)
    return budgets[len(budgets) // 2]


def _columns(evaluation: pl.DataFrame, params: "Params") -> tuple[str, ...]:
    """The metrics that the list of the sweep's runs shows beside each other."""
    measured = evaluation.select("benchmark", "metric").unique().iter_rows()
    scores = sorted({(benchmark, METRICS[metric].title) for benchmark, metric in measured})
    at_budget = [f"metrics.{name}_{metric}_at_{_headline_budget(name, params)}" for name, metric in scores]
    return (*at_budget, *(f"metrics.{name}_normalised_cost" for name in params.matrix.trained_on))
