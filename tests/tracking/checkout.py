"""What is in MLflow of a small run, and what should be."""

from pathlib import Path

from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking._tracking_service.utils import _tracking_store_registry

from pipeline.tracking.experiments import EVALUATIONS, HEADS, TRAININGS, find_experiment
from pipeline.tracking.store import connect
from stages.track import main as track
from tests.reporting.synthetic import MODEL

POLICY = Path("policies") / MODEL / "ruler" / "exact"
POLICIES = 10
# Seconds; enough for what these tests log.
PATIENCE = 60.0


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
    track()
    return count()


COMPLETE = {"evaluation": 1, "head": 4, "policy": POLICIES, "training": 1}
