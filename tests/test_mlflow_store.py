"""Whatever MLflow does, a finished training stays finished, says so in one line, and is logged later."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import requests
import sqlalchemy
import torch
from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking._tracking_service.utils import _tracking_store_registry
from ruamel.yaml import YAML

from pipeline import mlflow_store
from pipeline.errors import PipelineError
from pipeline.mlflow_store import EVALUATIONS, HEADS, TRAININGS, connect, find_experiment, links
from pipeline.traces.capture import LayerTrace
from pipeline.traces.shards import TraceShape, write_manifest, write_shard
from stages.results import results
from stages.track import track
from stages.train import main as train
from tests.reporting.synthetic import MODEL, REPOSITORY, Size, write_results

POLICY = Path("policies") / MODEL / "ruler" / "exact"
POLICIES = 13
# Seconds; enough for what these tests log.
PATIENCE = 60.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of a run of one model, corpus and estimator, an empty database, and traces to train on once more."""
    root = tmp_path_factory.mktemp("finished")
    write_results(root, Size(layers=2, kv_heads=2, steps=20))
    yaml = YAML()
    params = yaml.load((root / "params.yaml").read_text())
    params["matrix"] |= {"corpus": ["ruler"], "benchmark": ["ruler"], "estimator": ["exact"]}
    params["train"] |= {"steps": 3, "warmup_steps": 1, "validate_every": 1}
    yaml.dump(params, root / "params.yaml")
    shape = TraceShape(MODEL, "ruler", layers=2, kv_heads=2, head_dim=4, block_size=8)
    for split in ("train", "validation"):
        layers = [LayerTrace(torch.randn(2, 24, 4), torch.randn(2, 24, 4), torch.rand(2, 24, 3)) for _ in range(2)]
        write_shard(root / "traces" / MODEL / "ruler", split, 0, shape, [(0, "a", layers)])
    write_manifest(root / "traces" / MODEL / "ruler", shape, {"train": 1, "validation": 1})
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        results(Path("evaluations"), Path("policies"), Path("params.yaml"))
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
            patch.delenv(name, raising=False)
        with connect() as client:  # creating the schema takes longer than all the rest
            client.search_experiments()
    return root


@pytest.fixture
def checkout(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, entered, in which no policy is trained yet."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(mlflow_store, "PATIENCE", PATIENCE)
    forget()
    root = tmp_path / "checkout"
    shutil.copytree(finished, root)
    monkeypatch.chdir(root)
    shutil.rmtree(POLICY)
    return root


def forget() -> None:
    """As a new process, which keeps no connections by their address."""
    SqlAlchemyStore._engine_map.clear()
    _tracking_store_registry._get_store_with_resolved_uri.cache_clear()


def count() -> dict[str, int]:
    """Runs that are not deleted, by role."""
    with connect() as client:
        found = [find_experiment(client, each) for each in (TRAININGS, HEADS, EVALUATIONS)]
        roles = [run.data.tags["role"] for run in client.search_runs([one for one in found if one], max_results=1000)]
    return {role: roles.count(role) for role in sorted(set(roles))}


def fill() -> dict[str, int]:
    track(Path("policies"), Path("results"), Path("reports"), Path("params.yaml"))
    return count()


COMPLETE = {"evaluation": 1, "head": 4, "policy": POLICIES, "training": 1}
Break = Callable[[pytest.MonkeyPatch], AbstractContextManager[None]]


def held(code: str) -> Break:
    """Another process that holds what ``code`` takes."""

    @contextmanager
    def hold(_: pytest.MonkeyPatch) -> Iterator[None]:
        holder = subprocess.Popen(
            [sys.executable, "-c", f"{code}; print('held', flush=True); input()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.communicate("\n")

    return hold


DATABASE = "import sqlite3; c = sqlite3.connect('mlflow.db', isolation_level=None); c.execute('BEGIN EXCLUSIVE')"
LOCK = "import filelock; lock = filelock.FileLock('mlflow.db.lock'); lock.acquire()"


@contextmanager
def dead_server(patch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield


@contextmanager
def silent_server(patch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@contextmanager
def corrupt_database(_: pytest.MonkeyPatch) -> Iterator[None]:
    good = Path("mlflow.db").read_bytes()
    Path("mlflow.db").write_bytes(b"no database" * 1000)
    yield
    forget()
    Path("mlflow.db").write_bytes(good)


@contextmanager
def other_schema(_: pytest.MonkeyPatch) -> Iterator[None]:
    def set_version(version: str) -> str:
        with contextlib.closing(sqlite3.connect("mlflow.db")) as database, database:
            (before,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
            database.execute("UPDATE alembic_version SET version_num = ?", (version,))
        return str(before)

    ours = set_version("451aebb31d03")  # of 2019
    yield
    set_version(ours)


@contextmanager
def no_room_for_artifacts(_: pytest.MonkeyPatch) -> Iterator[None]:
    Path("mlartifacts").write_text("a file where a directory must be")
    yield
    Path("mlartifacts").unlink()


@contextmanager
def no_mlflow(patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.setitem(sys.modules, "mlflow", None)
    yield


def uri(value: str) -> Break:
    @contextmanager
    def wrong_uri(patch: pytest.MonkeyPatch) -> Iterator[None]:
        patch.setenv("MLFLOW_TRACKING_URI", value)
        yield

    return wrong_uri


def failing(method: str, error: Exception) -> Break:
    @contextmanager
    def raised_inside(patch: pytest.MonkeyPatch) -> Iterator[None]:
        def fail(*_arguments: object, **_options: object) -> None:
            raise error

        patch.setattr(MlflowClient, method, fail)
        yield

    return raised_inside


FAILURES: dict[str, tuple[Break, float, str]] = {
    # how, patience, what the warning says
    "locked database": (held(DATABASE), 2, "took more than 2 s"),
    "locked file": (held(LOCK), 1, "took more than 1 s"),
    "dead server": (dead_server, PATIENCE, "refused"),
    "silent server": (silent_server, 2, "took more than 2 s"),
    "corrupt database": (corrupt_database, 3, "took more than 3 s|not a database"),
    "other schema": (other_schema, PATIENCE, "mlflow db upgrade"),
    "no room for artifacts": (no_room_for_artifacts, PATIENCE, "mlartifacts"),
    "no mlflow": (no_mlflow, PATIENCE, "ModuleNotFoundError"),
    "unknown scheme": (uri("htp://nowhere"), PATIENCE, "htp"),
    "a directory": (uri("sqlite:///policies"), PATIENCE, "IsADirectoryError: a directory lies where"),
    "no driver": (uri("mssql+none://me:secret@localhost/runs"), PATIENCE, r"//\.\.\.@localhost"),
    "MlflowException": (failing("create_run", MlflowException("refused\nsecond line")), PATIENCE, r"\(.*: refused\)"),
    "sqlalchemy": (
        failing("log_batch", sqlalchemy.exc.OperationalError("INSERT", {}, Exception("disk I/O error"))),
        PATIENCE,
        "disk I/O error",
    ),
    "requests": (failing("set_tag", requests.ReadTimeout("read timed out")), PATIENCE, "read timed out"),
    "full disk": (failing("log_artifact", OSError(28, "No space left on device")), PATIENCE, "No space left"),
    "filelock": (failing("set_terminated", Timeout("mlflow.db.lock")), PATIENCE, "Timeout"),
    "a bug": (failing("log_table", KeyError("loss")), PATIENCE, "KeyError"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_finished_training_stays_finished_and_is_logged_later(
    failure: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, patience, reason = FAILURES[failure]
    with monkeypatch.context() as patch, broken(patch):
        patch.setattr(mlflow_store, "PATIENCE", patience)
        train(MODEL, "ruler", "exact", device="cpu", cache_gb=0.1)
        files = {path.name: path.read_bytes() for path in POLICY.iterdir()}
        with pytest.raises(PipelineError, match=r"python -m stages\.track logs what it lacks\.$"):
            fill()
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning.startswith(f"warning: {POLICY} is finished, but not logged. MLflow at ")
    assert warning.endswith("python -m stages.track logs what it lacks.")
    assert "\n" not in warning
    assert "secret" not in warning
    assert re.search(reason, warning), warning
    assert {"config.json", "curves.parquet", "policy.safetensors", "README.md"} == set(files)
    assert fill() == COMPLETE
    assert files == {path.name: path.read_bytes() for path in POLICY.iterdir()}


def test_the_stage_ends_well_with_one_line(checkout: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    arguments = ("--model", MODEL, "--corpus", "ruler", "--estimator", "exact")
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"warning: {POLICY} is finished, but not logged. MLflow at http://127.0.0.1:{port} ")
    assert all(line.startswith("train ") for line in before), before  # progress
    assert (POLICY / "policy.safetensors").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "stages.track"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: MLflow at ")


def test_ctrl_c_during_logging_is_not_swallowed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(MODEL, "ruler", "exact", device="cpu", cache_gb=0.1)
    assert (POLICY / "policy.safetensors").is_file()
    assert fill() == COMPLETE


@pytest.mark.parametrize("restorable", [True, False])
def test_deleted_experiments_are_restored_or_made_anew(
    restorable: bool, checkout: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(MODEL, "ruler", "exact", device="cpu", cache_gb=0.1)
    assert fill() == COMPLETE
    with connect() as client:
        for experiment in (TRAININGS, HEADS, EVALUATIONS):
            client.delete_experiment(find_experiment(client, experiment))
    assert links("") == []
    if not restorable:

        def refuse(*_arguments: object) -> None:
            raise MlflowException("not yours")

        monkeypatch.setattr(MlflowClient, "restore_experiment", refuse)
    assert fill() == COMPLETE
    assert len(links("")) == 4
    with connect() as client:
        again = client.get_experiment_by_name(f"{TRAININGS.name} (2)")
        assert (again is None) == restorable
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_runs_that_were_deleted_are_logged_anew_without_their_old_parts(checkout: Path) -> None:
    train(MODEL, "ruler", "exact", device="cpu", cache_gb=0.1)
    assert fill() == COMPLETE
    with connect() as client:
        for experiment, role in ((TRAININGS, "training"), (EVALUATIONS, "evaluation")):
            (run,) = client.search_runs([find_experiment(client, experiment)], f"tags.role = '{role}'")
            client.delete_run(run.info.run_id)
    assert fill() == COMPLETE


@pytest.mark.parametrize("name", ["a b", "a#b", "50%", "a%20b", "ä", "a?b=c&d", "a;b"])
def test_odd_characters_in_the_path(name: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = checkout.rename(checkout.with_name(name))
    monkeypatch.chdir(odd)
    before = {path.name for path in odd.parent.iterdir()}
    train(MODEL, "ruler", "exact", device="cpu", cache_gb=0.1)
    with connect() as client:
        (run,) = client.search_runs([find_experiment(client, TRAININGS)])
        client.download_artifacts(run.info.run_id, "curves.parquet")
    assert (odd / "mlflow.db").is_file()
    (stored,) = (odd / "mlartifacts").rglob("curves.parquet")
    assert stored.read_bytes() == (POLICY / "curves.parquet").read_bytes()
    assert {path.name for path in odd.parent.iterdir()} == before
    assert {path.name for path in odd.iterdir()} >= {"policies", "mlartifacts", "mlflow.db"}
    # In a temporary experiment of DVC the checkout lies elsewhere.
    forget()
    inside = odd / "tmp"
    inside.mkdir()
    monkeypatch.chdir(inside)
    monkeypatch.setenv("DVC_ROOT", str(odd))
    with connect() as client:
        assert len(client.search_runs([find_experiment(client, TRAININGS)])) == 1
    assert list(inside.iterdir()) == []


def test_experiments_open_on_trainings_and_their_costs(checkout: Path) -> None:
    train(MODEL, "ruler", "exact", device="cpu", cache_gb=0.1)
    fill()
    with connect() as client:
        for experiment in (TRAININGS, HEADS, EVALUATIONS):
            identifier = find_experiment(client, experiment)
            tags = client.get_experiment(identifier).tags
            assert tags["mlflow.experimentKind"] == "custom_model_development"
            view = json.loads(json.loads(tags["mlflow.sharedViewState.kvp"])["state"])
            runs = client.search_runs([identifier], view["searchFilter"])
            assert {run.data.tags["role"] for run in runs} == {experiment.role}
            # Every column has a value in some run, and most in all.
            for column in view["selectedColumns"]:
                kind, name = column.rstrip("`").split(".`")
                assert any(name in getattr(run.data, kind) for run in runs), column
            assert "mlflow.parentRunId" not in {tag for run in runs for tag in run.data.tags}
        colours = {run.data.tags["mlflow.runColor"] for run in runs}
        assert len(colours) == POLICIES


def test_what_a_user_changed_in_the_pages_stays(checkout: Path) -> None:
    train(MODEL, "ruler", "exact", device="cpu", cache_gb=0.1)
    changed = json.dumps({"name": "mine", "createdAt": 0, "updatedAt": 1, "state": "{}"})
    with connect() as client:
        identifier = find_experiment(client, TRAININGS)
        client.set_experiment_tag(identifier, "mlflow.note.content", "my notes")
        client.set_experiment_tag(identifier, "mlflow.sharedViewState.kvp", changed)
    fill()
    with connect() as client:
        tags = client.get_experiment(identifier).tags
        assert tags["mlflow.note.content"] == "my notes"
        assert tags["mlflow.sharedViewState.kvp"] == changed


def test_databases_with_heads_among_the_trainings_keep_working(checkout: Path) -> None:
    train(MODEL, "ruler", "exact", device="cpu", cache_gb=0.1)
    with connect() as client:  # as they were written before
        (run,) = client.search_runs([find_experiment(client, TRAININGS)])
        tags = {"role": "head", "mlflow.parentRunId": run.info.run_id}
        heads = [client.create_run(run.info.experiment_id, tags=tags) for _ in range(4)]
        for head in client.search_runs([find_experiment(client, HEADS)]):
            client.delete_run(head.info.run_id)
    assert fill() == COMPLETE  # nothing is logged twice
    with connect() as client:
        client.delete_tag(run.info.run_id, "complete")
    fill()
    with connect() as client:
        for head in heads:
            assert client.get_run(head.info.run_id).info.lifecycle_stage == "deleted"
    assert count() == COMPLETE


def test_the_alarm_of_somebody_else_goes_on() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: rung.append(number))
    old = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with mlflow_store._deadline(50):
            pass
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 90 < left <= 100
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *old)
