"""A training in MLflow: a run with curves over heads, and a run for each head in an experiment beside it."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.errors import PipelineError
from pipeline.files import hash_file
from pipeline.reporting.aggregate import over_heads
from pipeline.reporting.read import read_table
from pipeline.tables import CURVES
from pipeline.tracking import runs
from pipeline.tracking.experiments import HEADS, TRAININGS, open_experiment, page
from pipeline.tracking.store import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Points of a metric: a chart shows no more, and writing the heads' points takes most of the time.
PARENT_POINTS = 200
HEAD_POINTS = 75
# Of a policy's config.json.
_IDENTITY = ("model", "trained_on", "estimator")
_SIZES = ("layers", "kv_heads", "head_dim", "parameters_per_agent")


def log_finished_training(policy_dir: Path) -> None:
    """As :func:`log_training`, where nothing that goes wrong may cost the training: it becomes one warning."""
    try:
        log_training(policy_dir)
    except Exception as error:
        sentence = str(error)
        if not isinstance(error, PipelineError):
            sentence = f"{type(error).__name__}: {error}; python -m stages.track tries it again."
        logging.getLogger(__name__).warning("warning: %s is finished, but not logged. %s", policy_dir, sentence)


def log_training(policy_dir: Path) -> str:
    """Log one training: a run with curves over heads, and in an experiment beside it a run for each head.

    ``policy_dir`` is a finished policy: config.json, curves.parquet, README.md.

    Returns
    -------
    Id of the training's run; that of the existing one if this training is logged already.

    Raises
    ------
    PipelineError
        The policy is not finished, or MLflow cannot be used.
    """
    config, fingerprint = _read_config(policy_dir / "config.json"), hash_file(policy_dir / "config.json")
    with connect() as client:
        experiment, heads = open_experiment(client, TRAININGS), open_experiment(client, HEADS)
        if known := runs.complete_run(client, experiment, "training", fingerprint):
            return known
        # Of a training that was interrupted, or deleted.
        runs.delete_runs(client, heads, f"tags.fingerprint = '{fingerprint}'")
        curves = read_table(policy_dir / "curves.parquet", CURVES)
        train = config["params"]
        name = f"{config['trained_on']} {config['estimator']} {train['steps']} steps lr {train['learning_rate']:g}"
        others = client.search_runs([experiment], "tags.role = 'training'", max_results=50_000)
        training = runs.start(client, experiment, name, _training_tags(config, fingerprint) | runs.colour(len(others)))
        # MLflow shows this above a run. Without a server's address it works at any, and in the run's own tab.
        of_heads = page("", heads, search=f"tags.part_of = '{training}'")
        count = config["layers"] * config["kv_heads"]
        client.set_tag(training, "mlflow.note.content", f"[Its {count} heads]({of_heads.removeprefix('/')})")
        runs.log(client, training, _aggregate_metrics(_thinned(curves, PARENT_POINTS)), params=_training_params(config))
        _log_traces(client, training, config)
        client.log_table(training, _last_values(curves), "heads.json")
        for file in ("config.json", "curves.parquet", "README.md"):
            if (policy_dir / file).is_file():
                client.log_artifact(training, str(policy_dir / file))
        identity = {name: str(config[name]) for name in _IDENTITY} | {"fingerprint": fingerprint}
        by_head = _thinned(curves, HEAD_POINTS).sort("layer", "kv_head", "metric", "step")
        for (layer, kv_head), part in by_head.group_by("layer", "kv_head", maintain_order=True):
            tags = identity | {"role": "head", "part_of": training, "layer": str(layer), "kv_head": str(kv_head)}
            head = runs.start(client, heads, f"layer {layer} head {kv_head}, {name}", tags)
            runs.log(client, head, list(part.select("metric", "value", "step").iter_rows()))
            client.set_terminated(head)
        runs.finish(client, training)
        return training


def _log_traces(client: "MlflowClient", run: str, config: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # The digest column holds 36 characters.
    dataset = Dataset(
        name=f"traces of {config['trained_on']}",
        digest=str(config["trace_fingerprint"])[:36],
        source_type="local",
        source=json.dumps({"uri": f"traces/{config['model']}/{config['trained_on']}"}),
    )
    client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _thinned(curves: pl.DataFrame, most: int) -> pl.DataFrame:
    """At most ``most`` evenly spaced steps of each metric, the last one among them."""
    step = pl.col("step").rank("dense").over("metric") - 1  # 0, 1, ... within a metric
    last = step.max().over("metric")
    stride = last // most + 1
    return curves.filter((last - step) % stride == 0)


def _aggregate_metrics(curves: pl.DataFrame) -> list[tuple[str, float, int]]:
    return [
        (f"{name}_{row['metric']}", row[name], row["step"])
        for row in over_heads(curves, ["metric", "step"]).iter_rows(named=True)
        for name in ("mean", "q10", "q90")
    ]


def _last_values(curves: pl.DataFrame) -> dict[str, list[Any]]:
    last = curves.sort("step").group_by("layer", "kv_head", "metric").agg(pl.col("value").last())
    table = last.sort("metric").pivot("metric", index=["layer", "kv_head"]).sort("layer", "kv_head")
    return table.to_dict(as_series=False)


def _training_params(config: dict[str, Any]) -> dict[str, Any]:
    train = {name: value for name, value in config["params"].items() if name != "agent"}
    agent = {f"agent_{name}": value for name, value in config["params"].get("agent", {}).items()}
    return {name: config[name] for name in (*_IDENTITY, *_SIZES)} | train | agent


def _training_tags(config: dict[str, Any], fingerprint: str) -> dict[str, str]:
    identity = {name: str(config[name]) for name in (*_IDENTITY, "trace_fingerprint")} | {"fingerprint": fingerprint}
    return runs.origin_tags() | identity | {"role": "training", "params_hash": runs.hash_of(config["params"])}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist; run the train stage (dvc repro does).") from None
    except json.JSONDecodeError as error:
        raise PipelineError(f"{path} is not valid JSON ({error}); run the train stage again.") from None
    missing = [name for name in (*_IDENTITY, *_SIZES, "params", "trace_fingerprint") if name not in config]
    if missing:
        raise PipelineError(f"{path} lacks {', '.join(missing)}; run the train stage again.")
    return config
