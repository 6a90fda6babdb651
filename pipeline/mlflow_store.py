"""Where MLflow's data lies, how to reach it without ever waiting for ever, and what its pages show first.

It knows experiments, addresses and views; what is logged into them is in ``pipeline/tracking.py``. MLflow is imported
inside functions: it takes 1.7 s, which ``--help`` should not wait for.
"""

import itertools
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from filelock import FileLock

from pipeline.errors import PipelineError
from pipeline.workdir import repository_root

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
# Name of our view of an experiment in the addresses of MLflow's pages.
VIEW = "kvp"
_VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"


@dataclass(frozen=True)
class Experiment:
    """An experiment, and what its page shows.

    Parameters
    ----------
    description
        Markdown, shown above the list of runs.
    view
        What MLflow calls the view in its menu of views.
    role
        Tag ``role`` of the runs that the view lists.
    columns
        ``params.name``, ``metrics.name`` or ``tags.name`` of the columns beside the run's name.
    """

    name: str
    description: str
    view: str
    role: str
    columns: tuple[str, ...]


# Shown where one gets lost: MLflow starts with its side for chats, whose pages of these experiments are empty.
_SIDE = "Choose *Model training* at the top left. "
TRAININGS = Experiment(
    "KVP trainings",
    _SIDE + "Cost 1 is the best order; heads are in *KVP heads*.",
    "Costs of the trainings",
    "training",
    ("metrics.mean_validation_cost", "metrics.mean_loss", "params.estimator", "params.corpus", "params.model"),
)
HEADS = Experiment(
    "KVP heads",
    _SIDE + "The tag *part_of* is the id of a head's run in *KVP trainings*.",
    "Costs of the heads",
    "head",
    ("metrics.validation_cost", "metrics.loss", "tags.estimator", "tags.corpus", "tags.layer", "tags.kv_head"),
)
EVALUATIONS = Experiment(
    "KVP evaluations",
    _SIDE + "The step of a metric is the budget: charts draw it against tokens kept.",
    "Policies of the sweep",
    "policy",
    (),
)


@contextmanager
def connect(patience: float | None = None) -> "Iterator[MlflowClient]":
    """A client on a ready database, for one process at a time and for a bounded time.

    The lock serves three ends: two processes creating the schema crash each other, one process must
    not take a run that another is still logging for an interrupted one, and SQLite has one writer.

    Parameters
    ----------
    patience
        Seconds after which it gives up, ``PATIENCE`` where none are given.

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


def open_experiment(client: "MlflowClient", experiment: Experiment) -> str:
    """Id of the experiment, made or restored where needed, with its description and its view.

    One that was deleted keeps its name. It is restored; where that is refused, another is made beside it.
    """
    from mlflow.exceptions import MlflowException

    for name in _names(experiment):
        found = client.get_experiment_by_name(name)
        if found is None:
            identifier = str(client.create_experiment(name, artifact_location=_artifacts()))
            break
        identifier = str(found.experiment_id)
        if found.lifecycle_stage == "active":
            break
        with suppress(MlflowException):
            client.restore_experiment(identifier)
            break
    known = client.get_experiment(identifier).tags
    for tag, value in _page_tags(experiment).items():
        if tag not in known or (tag == _VIEW_TAG and known[tag] != value and not _changed_by_hand(known[tag])):
            client.set_experiment_tag(identifier, tag, value)
    return identifier


def find_experiment(client: "MlflowClient", experiment: Experiment) -> str | None:
    """Id of the experiment if there is one that is not deleted; nothing is made."""
    for name in _names(experiment):
        found = client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage == "active":
            return None if found is None else str(found.experiment_id)
    return None


def _names(experiment: Experiment) -> Iterator[str]:
    yield experiment.name
    yield from (f"{experiment.name} ({number})" for number in itertools.count(2))


def _page_tags(experiment: Experiment) -> dict[str, str]:
    columns = [re.sub(r"\.(.+)", r".`\1`", column) for column in experiment.columns]
    state = {
        "searchFilter": f"tags.role = '{experiment.role}'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {column: max(100, 7 * len(column) - 45) for column in columns},  # in pixels
        "runsHiddenMode": "SHOW_ALL",
    }
    # As MLflow writes a view that is saved by hand, but for the times.
    view = {"name": experiment.view, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return {
        # Without it the pages of an experiment open on traces of chats, of which there are none.
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": experiment.description,
        _VIEW_TAG: json.dumps(view),
    }


def _changed_by_hand(view: str) -> bool:
    try:
        return bool(json.loads(view)["updatedAt"])
    except (ValueError, KeyError, TypeError):
        return True


def page(base: str, identifier: str, charts: bool = False, search: str = "") -> str:
    """Address of an experiment's runs in our view, as a table or as charts, or of those that ``search`` finds."""
    query = {"workflowType": "machine_learning"}
    query |= {"searchFilter": search} if search else {"viewStateShareKey": VIEW}
    if charts:
        query["compareRunsMode"] = "CHART"
    return f"{base}/#/experiments/{identifier}/runs?{urlencode(query, quote_via=quote)}"


def server_address(uri: str, port: int = 5000) -> str:
    """Where the pages of the server are: at ``uri`` itself if that is one, or where ``make ui`` starts one."""
    return uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"


def links(base: str) -> list[str]:
    """A line with an address for each thing to look at, of the experiments that there are.

    Parameters
    ----------
    base
        Address of a server of this database (:func:`server_address`).

    Raises
    ------
    PipelineError
        MLflow cannot be used.
    """
    with connect() as client:
        known = {each.name: find_experiment(client, each) for each in (TRAININGS, EVALUATIONS)}
    wanted = (
        ("the trainings beside each other", TRAININGS, False),
        ("their curves", TRAININGS, True),
        ("the sweep's policies beside each other", EVALUATIONS, False),
        ("their charts against the budget", EVALUATIONS, True),
    )
    return [
        f"  {what}: {page(base, identifier, charts)}"
        for what, experiment, charts in wanted
        if (identifier := known[experiment.name])
    ]


def _artifacts() -> str | None:
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
