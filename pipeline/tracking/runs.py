"""What trainings and evaluations share: runs that are begun, filled, ended, and found again.

A run is found again by its ``fingerprint`` tag; one without the tag ``complete`` was interrupted, and is deleted and
logged anew, as is one that was deleted in MLflow's pages. A single head or policy that was deleted there stays deleted.
"""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files import hash_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

# The most that one request may carry.
BATCH = 1000
# Of lines and bars. MLflow draws them by the run's id, so that two of four may look the same.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#7A4B1E", "#000000", "#999999",
    "#882255", "#44AA99", "#B2DF8A",
)  # fmt: skip


def complete_run(client: "MlflowClient", experiment: str, role: str, fingerprint: str) -> str | None:
    """The complete run with this fingerprint, if any. Interrupted ones are deleted."""
    for run in client.search_runs([experiment], f"tags.fingerprint = '{fingerprint}' and tags.role = '{role}'"):
        parent = str(run.info.run_id)
        if run.data.tags.get("complete") == "true":
            return parent
        # In older databases heads and policies are its children. The parent last: a second interruption here leaves
        # it to be found again.
        delete_runs(client, experiment, f"tags.`mlflow.parentRunId` = '{parent}'")
        client.delete_run(parent)
    return None


def delete_runs(client: "MlflowClient", experiment: str, search: str) -> None:
    """All that ``search`` finds."""
    for run in client.search_runs([experiment], search, max_results=50_000):
        client.delete_run(run.info.run_id)


def colour(place: int) -> dict[str, str]:
    """The tag that colours a run."""
    return {"mlflow.runColor": COLOURS[place % len(COLOURS)]}


def start(client: "MlflowClient", experiment: str, name: str, tags: dict[str, str]) -> str:
    """Begin a run; returns its id."""
    return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)


def finish(client: "MlflowClient", run: str) -> None:
    """End a run that need not be logged again."""
    client.set_terminated(run)
    client.set_tag(run, "complete", "true")


def log(
    client: "MlflowClient", run: str, points: Sequence[tuple[str, float, int]], params: dict[str, Any] | None = None
) -> None:
    """Put metrics, as name, value and step, and params into a run."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    metrics: list[Metric] = [Metric(key, value, now, step) for key, value, step in points]
    if params:
        client.log_batch(run, params=[Param(name, str(value)) for name, value in params.items()])
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[first : first + BATCH])


def origin_tags() -> dict[str, str]:
    """Where a run comes from: stage, experiment, dvc.lock and commit."""
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


def hash_of(value: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
