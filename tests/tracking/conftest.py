"""A small run of which MLflow knows nothing yet."""

import contextlib
import shutil
from pathlib import Path

import polars as pl
import pytest
from ruamel.yaml import YAML

from pipeline.traces.shards import TraceShape
from pipeline.tracking import store
from pipeline.tracking.store import connect
from stages.results import main as results
from tests.reporting.synthetic import MODEL, Size, write_results
from tests.traces.synthetic import random_cache, write_traces
from tests.tracking.checkout import PATIENCE, POLICY, forget


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of a run of one model, benchmark and estimator, an empty database, and traces to train on once more."""
    root = tmp_path_factory.mktemp("finished")
    write_results(root, Size(layers=2, kv_heads=2, steps=20))
    yaml = YAML()
    params = yaml.load((root / "params.yaml").read_text())
    params["matrix"] |= {"trained_on": ["ruler"], "benchmark": ["ruler"], "estimator": ["exact"]}
    params["train"] |= {"steps": 3, "warmup_steps": 1, "validate_every": 1}
    yaml.dump(params, root / "params.yaml")
    of_matrix = pl.col("trained_on").is_null() | ((pl.col("trained_on") == "ruler") & (pl.col("policy") == "kvp-exact"))
    for file in (root / f"scores/{MODEL}/ruler.parquet", root / f"answers/{MODEL}/ruler/cost.parquet"):
        pl.read_parquet(file).filter(of_matrix).write_parquet(file)
    shape = TraceShape(MODEL, "ruler", (0, 1), kv_heads=2, head_dim=4)
    splits = {split: [[random_cache(shape, 24, seed)]] for seed, split in enumerate(("train", "validation"))}
    write_traces(root / "traces" / MODEL / "ruler", shape, splits)
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        results()
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
    monkeypatch.setattr(store, "PATIENCE", PATIENCE)
    forget()
    root = tmp_path / "checkout"
    shutil.copytree(finished, root)
    monkeypatch.chdir(root)
    shutil.rmtree(POLICY)
    return root
