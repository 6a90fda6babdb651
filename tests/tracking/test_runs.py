import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.errors import PipelineError
from pipeline.files import repository_root
from pipeline.params import Params
from pipeline.tracking import runs, trainings
from pipeline.tracking.evaluation import log_evaluation
from pipeline.tracking.experiments import EVALUATIONS, HEADS, TRAININGS, Experiment
from pipeline.tracking.store import connect, tracking_uri
from pipeline.tracking.trainings import log_training
from stages.results import main as results
from stages.track import main as track
from tests.reporting.synthetic import MODEL, REPOSITORY, Size, write_results

OF_A_TRAINING = 4  # heads
OF_THE_MATRIX = 4  # trainings
POLICIES = 13


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """All files of a run of two benchmarks and two estimators, and an empty database."""
    root = tmp_path_factory.mktemp("made")
    params = write_results(root, Size(layers=2, kv_heads=2))
    (root / "reports").mkdir()
    (root / "reports/index.html").write_text("<p>report</p>")
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        _forget_environment(patch)
        results()
        with connect() as client:  # creating the schema takes longer than all the rest
            client.search_experiments()
    return root, params


@pytest.fixture
def params(made: tuple[Path, Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """A copy of it, entered."""
    _forget_environment(monkeypatch)
    root, params = made
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return params


def _forget_environment(patch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
        patch.delenv(name, raising=False)


def _runs(experiment: Experiment, role: str) -> list[Any]:
    with connect() as client:
        found = client.get_experiment_by_name(experiment.name)
        return list(client.search_runs([found.experiment_id], f"tags.role = '{role}'"))


def _count() -> dict[str, int]:
    roles = ((TRAININGS, "training"), (HEADS, "head"))
    roles += ((EVALUATIONS, "evaluation"), (EVALUATIONS, "policy"))
    return {role: len(_runs(experiment, role)) for experiment, role in roles}


def test_a_second_fill_adds_nothing(params: Params) -> None:
    track()
    expected = {"training": OF_THE_MATRIX, "head": OF_THE_MATRIX * OF_A_TRAINING, "evaluation": 1, "policy": POLICIES}
    assert _count() == expected
    track()
    assert _count() == expected
    assert all(run.info.status == "FINISHED" for run in _runs(HEADS, "head"))


def test_a_training_that_is_not_the_same_is_another_run(params: Params) -> None:
    policy = Path("policies") / MODEL / "ruler" / "exact"
    first = log_training(policy)
    assert log_training(policy) == first
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"sha256": "of other weights"}))
    assert log_training(policy) != first
    assert len(_runs(TRAININGS, "training")) == 2


def test_an_interrupted_training_is_completed(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Path("policies") / MODEL / "ruler" / "exact"
    with monkeypatch.context() as patch:
        _break_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            log_training(policy)
    assert len(_runs(HEADS, "head")) == 2
    log_training(policy)
    assert len(_runs(TRAININGS, "training")) == 1
    assert len(_runs(HEADS, "head")) == OF_A_TRAINING


def test_an_interrupted_evaluation_is_completed(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _break_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            log_evaluation(Path("results"), Path("reports"), params)
    assert len(_runs(EVALUATIONS, "policy")) == 4
    log_evaluation(Path("results"), Path("reports"), params)
    assert len(_runs(EVALUATIONS, "evaluation")) == 1
    assert len(_runs(EVALUATIONS, "policy")) == POLICIES


def test_logged_values_are_those_of_the_files(params: Params) -> None:
    parent = log_training(Path("policies") / MODEL / "dialogues" / "rloo")
    log_evaluation(Path("results"), Path("reports"), params)
    curves = pl.read_parquet(Path("policies") / MODEL / "dialogues" / "rloo" / "curves.parquet")
    scores = pl.read_parquet("results/evaluation.parquet")
    with connect() as client:
        logged = client.get_metric_history(parent, "mean_validation_cost")
        expected = curves.filter(metric="validation_cost").group_by("step").agg(pl.col("value").mean()).sort("step")
        assert [point.step for point in logged] == expected["step"].to_list()
        np.testing.assert_allclose([point.value for point in logged], expected["value"].to_numpy(), rtol=1e-6)
    (head,) = (run for run in _runs(HEADS, "head") if run.data.tags["layer"] + run.data.tags["kv_head"] == "10")
    (sweep,) = (
        run
        for run in _runs(EVALUATIONS, "policy")
        if (run.data.tags["policy"], run.data.tags["trained_on"]) == ("kvp-exact", "ruler")
    )
    (ceiling,) = (run for run in _runs(EVALUATIONS, "policy") if run.data.tags["policy"] == "full")
    with connect() as client:
        for metric in ("loss", "gradient_norm", "validation_cost"):
            points = client.get_metric_history(head.info.run_id, metric)
            raw = curves.filter(metric=metric, layer=1, kv_head=0).sort("step")
            assert [(point.step, point.value) for point in points] == list(raw.select("step", "value").iter_rows())
        history = client.get_metric_history(sweep.info.run_id, "ruler_accuracy")
        ours = scores.filter(benchmark="ruler", policy="kvp-exact", trained_on="ruler")
        means = ours.group_by("budget").agg(pl.col("value").mean()).sort("budget")
        assert [point.step for point in history] == means["budget"].to_list()
        np.testing.assert_allclose([point.value for point in history], means["value"].to_numpy())
        assert len(client.get_metric_history(ceiling.info.run_id, "dialogues_perplexity")) == len(
            params.evaluation.budgets
        )
        assert sweep.data.metrics["ruler_normalised_cost"] > 1
        evaluation = sweep.data.tags["part_of"]
        assert {item.path for item in client.list_artifacts(evaluation, "report")} == {"report/index.html"}


def test_runs_say_where_they_come_from(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train@ruler")
    monkeypatch.setenv("DVC_EXP_NAME", "soapy-corn")
    Path("dvc.lock").write_text("schema: '2.0'\n")
    log_training(Path("policies") / MODEL / "ruler" / "exact")
    (run,) = _runs(TRAININGS, "training")
    assert run.info.run_name == f"ruler exact {params.train.steps} steps lr {params.train.learning_rate:g}"
    assert run.data.tags["dvc.stage"] == "train@ruler"
    assert run.data.tags["dvc.exp"] == "soapy-corn"
    assert len(run.data.tags["dvc.lock"]) == 64
    assert run.data.tags["complete"] == "true"
    assert run.data.params["learning_rate"] == str(params.train.learning_rate)
    assert run.inputs.dataset_inputs[0].dataset.digest == b"ruler".hex()
    assert Path("mlartifacts").is_dir()


def test_long_curves_are_thinned_to_their_last_step() -> None:
    steps = pl.DataFrame({"step": range(1, 4001), "metric": "loss", "value": 0.0})
    thinned = trainings._thinned(steps, 200)
    assert 150 <= thinned.height <= 200
    assert thinned["step"].max() == 4000


def test_the_database_of_an_experiment_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert tracking_uri(repository_root()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    assert tracking_uri(repository_root()) == "sqlite:///elsewhere.db"


def test_an_unfinished_policy_is_a_sentence(params: Params) -> None:
    with pytest.raises(PipelineError, match=r"config\.json does not exist; run the train stage"):
        log_training(Path("policies") / "nowhere")
    broken = Path("policies") / MODEL / "ruler" / "exact" / "config.json"
    broken.write_text("{}")
    with pytest.raises(PipelineError, match="lacks model, trained_on"):
        log_training(broken.parent)


# Forks of one process that has imported everything begin at the same moment.
AT_ONCE = """
import os, sys, traceback
from pathlib import Path
import mlflow
from pipeline.tracking.trainings import log_training

running = []
for entry in sys.argv[1:]:
    running.append(os.fork())
    if running[-1] == 0:
        try:
            log_training(Path(entry))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in running))
"""


def test_several_processes_fill_one_fresh_database(params: Params) -> None:
    Path("mlflow.db").unlink()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    entries = [Path("policies") / MODEL / name / e for name in ("ruler", "dialogues") for e in ("exact", "rloo")]
    # The first policy twice: two processes must not both log it.
    command = [sys.executable, "-c", AT_ONCE, *map(str, (entries[0], *entries))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0"] * 5, done.stderr
    assert len(_runs(TRAININGS, "training")) == OF_THE_MATRIX
    assert len(_runs(HEADS, "head")) == OF_THE_MATRIX * OF_A_TRAINING


def _break_after(monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    """Ctrl-C instead of starting one more run than ``started``."""
    start: Callable[..., str] = runs.start
    left = [started]

    def breaking(*arguments: object) -> str:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return start(*arguments)

    monkeypatch.setattr(runs, "start", breaking)
