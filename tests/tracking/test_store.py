"""The database and its pages: what is deleted, moved or changed by hand."""

import json
import logging
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.tracking import store
from pipeline.tracking.experiments import EVALUATIONS, HEADS, TRAININGS, find_experiment, links
from pipeline.tracking.store import connect
from stages.train import main as train
from tests.reporting.synthetic import MODEL
from tests.tracking.checkout import COMPLETE, POLICIES, POLICY, count, fill, forget


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
        with store._deadline(50):
            pass
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 90 < left <= 100
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *old)
