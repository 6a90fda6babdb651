"""Where MLflow's data lies, and how to reach it without ever waiting for ever. It knows no experiment.

MLflow is imported inside functions: it takes 1.7 s, which ``--help`` should not wait for.
"""

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from filelock import FileLock

from pipeline.errors import PipelineError
from pipeline.files import repository_root

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Seconds that one training, or the evaluations, may take to be logged; 90 heads take 4.
PATIENCE = 300.0
# What holds for an MLflow server unless the user says otherwise: with MLflow's own 120 s and 7 retries, a server that
# does not answer would hold a finished training for an hour.
SERVER = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # Otherwise two lines on stdout for each run, so for each head.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextmanager
def connect(patience: float | None = None) -> "Iterator[MlflowClient]":
    """A client on a ready database, for one process at a time and for a bounded time.

    The lock serves three ends: two processes creating the schema crash each other, one process must
    not take a run that another is still logging for an interrupted one, and SQLite has one writer. After ``patience``
    seconds it gives up, ``PATIENCE`` where none are given.

    Raises
    ------
    PipelineError
        Whatever else went wrong in MLflow, at its server or in its database. Ctrl-C stays what it is.
    """
    # Read when mlflow is imported, so it must be set before.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in SERVER.items():
        os.environ.setdefault(name, value)
    root = repository_root()
    uri = tracking_uri(root)
    limit = PATIENCE if patience is None else patience
    try:
        if uri.startswith("sqlite:///") and Path(uri.removeprefix("sqlite:///")).is_dir():
            raise IsADirectoryError("a directory lies where the database must be")  # MLflow would try again for minutes
        with _deadline(limit), FileLock(root / "mlflow.db.lock"):
            from mlflow import MlflowClient

            # What they warn about ends in one sentence below, or does not matter.
            for noisy in ("alembic", "mlflow", "sqlalchemy", "urllib3"):
                logging.getLogger(noisy).setLevel(logging.CRITICAL)
            yield MlflowClient(tracking_uri=uri)
    except PipelineError:
        raise
    except _OutOfTime:
        raise PipelineError(_advice(uri, f"it took more than {limit:g} s")) from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise PipelineError(_advice(uri, f"{type(error).__name__}: {lines[0]}".rstrip(": ."))) from error


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the SQLite database at ``root``."""
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    path = str(root / "mlflow.db")
    if "%" in path or "?" in path:
        # SQLAlchemy wants them quoted, and MLflow would make a directory of the quoted name; seen from here there are
        # none.
        path = quote(os.path.relpath(path), safe="/ ")
    return f"sqlite:///{path}"


def shown_uri(uri: str) -> str:
    """The address without the password in it."""
    return re.sub(r"//[^/@]*@", "//...@", uri)


def server_address(uri: str, port: int = 5000) -> str:
    """Where the pages of the server are: at ``uri`` itself if that is one, or where ``make ui`` starts one."""
    return uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"


def artifacts() -> str | None:
    """Address of what runs keep as files; None leaves it to a server."""
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http", "databricks")):
        # A server knows where its artifacts go; a local database would put them into the current directory.
        return (repository_root() / "mlartifacts").as_uri()
    return None


def _advice(uri: str, reason: str) -> str:
    return (
        f"MLflow at {shown_uri(uri)} does not take the runs ({reason}); nothing but their display is missing, and once "
        "MLflow can be used again, python -m stages.track logs what it lacks."
    )


class _OutOfTime(BaseException):
    """No Exception, because libraries catch those to try again."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise ``_OutOfTime`` in the block after ``seconds``, whatever it is waiting for."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can be interrupted
        return

    def stop(_signal: int, _frame: object) -> None:
        raise _OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    # Once more every second: Python drops what is raised inside a __del__.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - started)), interval)
