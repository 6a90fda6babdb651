"""The experiments, and what MLflow's pages show of them first. It knows what runs are called, and logs none."""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from pipeline.tracking.store import artifacts, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
    ("metrics.mean_validation_cost", "metrics.mean_loss", "params.estimator", "params.trained_on", "params.model"),
)
HEADS = Experiment(
    "KVP heads",
    _SIDE + "The tag *part_of* is the id of a head's run in *KVP trainings*.",
    "Costs of the heads",
    "head",
    ("metrics.validation_cost", "metrics.loss", "tags.estimator", "tags.trained_on", "tags.layer", "tags.kv_head"),
)
EVALUATIONS = Experiment(
    "KVP evaluations",
    _SIDE + "The step of a metric is the budget: charts draw it against tokens kept.",
    "Policies of the sweep",
    "policy",
    (),
)


def open_experiment(client: "MlflowClient", experiment: Experiment) -> str:
    """Id of the experiment, made or restored where needed, with its description and its view.

    One that was deleted keeps its name. It is restored; where that is refused, another is made beside it.
    """
    from mlflow.exceptions import MlflowException

    for name in _names(experiment):
        found = client.get_experiment_by_name(name)
        if found is None:
            identifier = str(client.create_experiment(name, artifact_location=artifacts()))
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


def links(base: str) -> list[str]:
    """A line with an address for each thing to look at, of the experiments that there are.

    ``base`` is the address of a server of this database (:func:`server_address`).

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
