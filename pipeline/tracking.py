"""What is compared goes to MLflow from here, out of the files other stages wrote; nothing reads it back.

It knows no training and no evaluation, and ``pipeline/mlflow_store.py`` how MLflow is reached. Deleting the
database loses nothing: every function starts from files. A run is found again by its ``fingerprint``
tag; one without the tag ``complete`` was interrupted, and is deleted and logged anew, as is one that was
deleted in MLflow's pages. A single head or policy that was deleted there stays deleted.
"""

import hashlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline import mlflow_store
from pipeline.errors import PipelineError
from pipeline.mlflow_store import EVALUATIONS, HEADS, TRAININGS, connect, open_experiment
from pipeline.params import Params
from pipeline.reporting import names, tables
from pipeline.workdir import hash_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Points of a metric: a chart shows no more, and writing the heads' points takes most of the time.
PARENT_POINTS = 200
HEAD_POINTS = 75
# The most that one request may carry.
BATCH = 1000
# Of lines and bars. MLflow draws them by the run's id, so that two of four may look the same.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#7A4B1E", "#000000", "#999999",
    "#882255", "#44AA99", "#B2DF8A",
)  # fmt: skip


def log_finished_training(policy_dir: Path) -> None:
    """As :func:`log_training`, where nothing that goes wrong may cost the training: it becomes one warning."""
    try:
        log_training(policy_dir)
    except Exception as error:
        sentence = str(error) if isinstance(error, PipelineError) else _unexpected(error)
        logging.getLogger(__name__).warning("warning: %s is finished, but not logged. %s", policy_dir, sentence)


def log_training(policy_dir: Path) -> str:
    """Log one training: a run with curves over heads, and in an experiment beside it a run for each head.

    Parameters
    ----------
    policy_dir
        A finished policy: config.json, curves.parquet, README.md.

    Returns
    -------
    str
        Id of the training's run; that of the existing one if this training is logged already.

    Raises
    ------
    PipelineError
        The policy is not finished, or MLflow cannot be used.
    """
    config = _read_config(policy_dir / "config.json")
    fingerprint = config["fingerprint"]
    with connect() as client:
        experiment, heads = open_experiment(client, TRAININGS), open_experiment(client, HEADS)
        if known := _complete_run(client, experiment, "training", fingerprint):
            return known
        # Of a training that was interrupted, or deleted.
        _delete_runs(client, heads, f"tags.fingerprint = '{fingerprint}'")
        curves = tables.read_table(policy_dir / "curves.parquet", tables.CURVE_COLUMNS)
        name = _training_name(config)
        others = client.search_runs([experiment], "tags.role = 'training'", max_results=50_000)
        training = _start(client, experiment, name, _training_tags(config) | _colour(len(others)))
        # MLflow shows this above a run. Without a server's address it works at any, and in the run's own tab.
        of_heads = mlflow_store.page("", heads, search=f"tags.part_of = '{training}'")
        client.set_tag(training, "mlflow.note.content", f"[Its {_heads(config)} heads]({of_heads.removeprefix('/')})")
        _log(client, training, _aggregate_metrics(_thinned(curves, PARENT_POINTS)), params=_training_params(config))
        _log_traces(client, training, config)
        client.log_table(training, _last_values(curves), "heads.json")
        for file in ("config.json", "curves.parquet", "README.md"):
            if (policy_dir / file).is_file():
                client.log_artifact(training, str(policy_dir / file))
        identity = {name: str(config[name]) for name in ("model", "corpus", "estimator", "fingerprint")}
        by_head = _thinned(curves, HEAD_POINTS).sort("layer", "kv_head", "metric", "step")
        for (layer, kv_head), part in by_head.group_by("layer", "kv_head", maintain_order=True):
            tags = identity | {"role": "head", "part_of": training, "layer": str(layer), "kv_head": str(kv_head)}
            head = _start(client, heads, f"layer {layer} head {kv_head}, {name}", tags)
            _log(client, head, list(part.select("metric", "value", "step").iter_rows()))
            client.set_terminated(head)
        _finish(client, training)
        return training


def log_evaluation(results: Path, reports: Path, params: Params) -> list[str]:
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
    list[str]
        Ids of the models' runs, one for each model of the matrix.
    """
    evaluation = tables.read_table(results / "evaluation.parquet", tables.EVALUATION_COLUMNS)
    cost = tables.read_table(results / "cost.parquet", tables.COST_COLUMNS)
    files = hash_file(results / "evaluation.parquet") + hash_file(results / "cost.parquet")
    parents = []
    with connect() as client:
        shown = (*EVALUATIONS.columns, *_columns(evaluation, params))
        experiment = open_experiment(client, replace(EVALUATIONS, columns=shown))
        for model in params.matrix.model:
            fingerprint = _hash({"files": files, "model": model, "report": params.report.model_dump(mode="json")})
            parent = _complete_run(client, experiment, "evaluation", fingerprint)
            if parent is None:
                # Of an evaluation that was interrupted, or deleted.
                _delete_runs(client, experiment, f"tags.fingerprint = '{fingerprint}' and tags.role = 'policy'")
                ours = evaluation.filter(pl.col("model") == model)
                our_cost = cost.filter(pl.col("model") == model)
                parent = _log_model_evaluation(client, experiment, fingerprint, (ours, our_cost), reports, params)
            parents.append(parent)
    return parents


def _log_model_evaluation(
    client: "MlflowClient",
    experiment: str,
    fingerprint: str,
    frames: tuple[pl.DataFrame, pl.DataFrame],
    reports: Path,
    params: Params,
) -> str:
    evaluation, cost = frames
    scores = tables.score_table(evaluation, params.report)
    costs = tables.cost_table(tables.normalised_costs(cost, evaluation), params.report)
    model = str(evaluation["model"].first())
    tags = _origin_tags() | {"role": "evaluation", "fingerprint": fingerprint, "model": model}
    benchmarks = ", ".join(params.matrix.benchmark)
    parent = _start(client, experiment, f"{model} on {benchmarks}, budget sweep", tags)
    sweep = params.evaluation.model_dump(mode="json") | {"benchmarks": benchmarks}
    _log(client, parent, [], params=sweep | {"params_hash": _hash(sweep)})
    client.log_table(parent, scores.to_dict(as_series=False), "scores.json")
    client.log_table(parent, costs.to_dict(as_series=False), "normalised_cost.json")
    for place, (policy, trained_on) in enumerate(tables.series(scores)):
        name = f"{policy} trained on {trained_on}" if trained_on else policy
        identity = {"model": model, "policy": policy, "trained_on": trained_on or "none"}
        tags = identity | {"role": "policy", "part_of": parent, "fingerprint": fingerprint} | _colour(place)
        child = _start(client, experiment, name, tags)
        points = _score_points(tables.select(scores, policy, trained_on), params)
        points += _cost_points(tables.select(costs, policy, trained_on))
        _log(client, child, points, params=identity)
        client.set_terminated(child)
    if reports.is_dir():
        client.log_artifacts(parent, str(reports), "report")
    _finish(client, parent)
    return parent


def _score_points(scores: pl.DataFrame, params: Params) -> list[tuple[str, float, int]]:
    points = []
    for row in scores.iter_rows(named=True):
        # No budget means no eviction: the same value at every budget draws the ceiling as a line.
        steps = params.budgets(row["benchmark"]) if row["budget"] is None else [row["budget"]]
        metric = f"{row['benchmark']}_{row['metric']}"
        points += [(metric, row["mean"], step) for step in steps]
        if (budget := _headline_budget(row["benchmark"], params)) in steps:
            points.append((f"{metric}_at_{budget}", row["mean"], 0))
    return points


def _headline_budget(benchmark: str, params: Params) -> int:
    """The budget whose scores stand in the list of runs: the middle one, as in the report."""
    budgets = params.budgets(benchmark)
    return budgets[len(budgets) // 2]


def _columns(evaluation: pl.DataFrame, params: Params) -> tuple[str, ...]:
    """The metrics that the list of the sweep's runs shows beside each other."""
    measured = evaluation.select("benchmark", "metric").unique().iter_rows()
    scores = sorted({(benchmark, names.SHOWN_METRICS.get(metric, metric)) for benchmark, metric in measured})
    at_budget = [f"metrics.{name}_{metric}_at_{_headline_budget(name, params)}" for name, metric in scores]
    return (*at_budget, *(f"metrics.{corpus}_normalised_cost" for corpus in params.matrix.corpus))


def _cost_points(costs: pl.DataFrame) -> list[tuple[str, float, int]]:
    pooled = costs.filter(pl.col("scope") == "pooled")
    return [(f"{row['corpus']}_normalised_cost", row["mean"], 0) for row in pooled.iter_rows(named=True)]


def _complete_run(client: "MlflowClient", experiment: str, role: str, fingerprint: str) -> str | None:
    """The complete run with this fingerprint, if any. Interrupted ones are deleted."""
    for run in client.search_runs([experiment], f"tags.fingerprint = '{fingerprint}' and tags.role = '{role}'"):
        parent = str(run.info.run_id)
        if run.data.tags.get("complete") == "true":
            return parent
        # In older databases heads and policies are its children. The parent last: a second interruption here leaves
        # it to be found again.
        _delete_runs(client, experiment, f"tags.`mlflow.parentRunId` = '{parent}'")
        client.delete_run(parent)
    return None


def _delete_runs(client: "MlflowClient", experiment: str, search: str) -> None:
    for run in client.search_runs([experiment], search, max_results=50_000):
        client.delete_run(run.info.run_id)


def _colour(place: int) -> dict[str, str]:
    return {"mlflow.runColor": COLOURS[place % len(COLOURS)]}


def _start(client: "MlflowClient", experiment: str, name: str, tags: dict[str, str]) -> str:
    return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)


def _finish(client: "MlflowClient", run: str) -> None:
    client.set_terminated(run)
    client.set_tag(run, "complete", "true")


def _log(
    client: "MlflowClient", run: str, points: Sequence[tuple[str, float, int]], params: dict[str, Any] | None = None
) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    metrics: list[Metric] = [Metric(key, value, now, step) for key, value, step in points]
    if params:
        client.log_batch(run, params=[Param(name, str(value)) for name, value in params.items()])
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[start : start + BATCH])


def _log_traces(client: "MlflowClient", run: str, config: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # The digest column holds 36 characters.
    dataset = Dataset(
        name=f"traces of {config['corpus']}",
        digest=str(config["trace_fingerprint"])[:36],
        source_type="local",
        source=json.dumps({"uri": f"traces/{config['model']}/{config['corpus']}"}),
    )
    client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _thinned(curves: pl.DataFrame, most: int) -> pl.DataFrame:
    """At most ``most`` evenly spaced steps of each metric, the last one among them."""
    step = pl.col("step").rank("dense").over("metric") - 1  # 0, 1, ... within a metric
    last = step.max().over("metric")
    stride = last // most + 1
    return curves.filter((last - step) % stride == 0)


def _aggregate_metrics(curves: pl.DataFrame) -> list[tuple[str, float, int]]:
    value = pl.col("value").cast(pl.Float64)
    over_heads = (
        curves.group_by("metric", "step")
        .agg(mean=value.mean(), q10=value.quantile(0.1, "linear"), q90=value.quantile(0.9, "linear"))
        .sort("metric", "step")
    )
    return [
        (f"{name}_{row['metric']}", row[name], row["step"])
        for row in over_heads.iter_rows(named=True)
        for name in ("mean", "q10", "q90")
    ]


def _last_values(curves: pl.DataFrame) -> dict[str, list[Any]]:
    last = curves.sort("step").group_by("layer", "kv_head", "metric").agg(pl.col("value").last())
    table = last.sort("metric").pivot("metric", index=["layer", "kv_head"]).sort("layer", "kv_head")
    return table.to_dict(as_series=False)


def _heads(config: dict[str, Any]) -> int:
    return int(config["layers"]) * int(config["kv_heads"])


def _training_name(config: dict[str, Any]) -> str:
    train = config["params"]
    return f"{config['corpus']} {config['estimator']} {train['steps']} steps lr {train['learning_rate']:g}"


def _training_params(config: dict[str, Any]) -> dict[str, Any]:
    top = ("model", "corpus", "estimator", "layers", "kv_heads", "head_dim", "parameters_per_agent")
    train = {name: value for name, value in config["params"].items() if name != "agent"}
    agent = {f"agent_{name}": value for name, value in config["params"].get("agent", {}).items()}
    return {name: config[name] for name in top} | train | agent


def _training_tags(config: dict[str, Any]) -> dict[str, str]:
    identity = {
        name: str(config[name]) for name in ("model", "corpus", "estimator", "fingerprint", "trace_fingerprint")
    }
    return _origin_tags() | identity | {"role": "training", "params_hash": _hash(config["params"])}


def _origin_tags() -> dict[str, str]:
    tags = {"dvc.stage": os.environ.get("DVC_STAGE", "track")}
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.exp"] = experiment
    if Path("dvc.lock").is_file():
        tags["dvc.lock"] = hash_file(Path("dvc.lock"))
    revision = _git("rev-parse", "HEAD")
    if revision is not None:
        tags["mlflow.source.git.commit"] = revision
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def _git(*arguments: str) -> str | None:
    """Output of git, or None where there is no repository: the project works from a tarball too."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist; run the train stage (dvc repro does).") from None
    except json.JSONDecodeError as error:
        raise PipelineError(f"{path} is not valid JSON ({error}); run the train stage again.") from None
    needed = ("model", "corpus", "estimator", "layers", "kv_heads", "head_dim", "parameters_per_agent", "params")
    missing = [name for name in (*needed, "fingerprint", "trace_fingerprint") if name not in config]
    if missing:
        raise PipelineError(f"{path} lacks {', '.join(missing)}; run the train stage again.")
    return config


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__}: {error}; python -m stages.track tries it again."


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
