"""Whatever MLflow does, a finished training stays finished, says so in one line, and is logged later."""

import contextlib
import logging
import os
import re
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
from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.errors import PipelineError
from pipeline.tracking import store
from stages.train import main as train
from tests.reporting.synthetic import MODEL, REPOSITORY
from tests.tracking.checkout import COMPLETE, PATIENCE, POLICY, fill, forget

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
        patch.setattr(store, "PATIENCE", patience)
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
    arguments = ("--model", MODEL, "--trained-on", "ruler", "--estimator", "exact")
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
