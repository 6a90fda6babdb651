"""The whole pipeline as a user runs it, on the ci profile: dvc repro, interruptions, push, pull, a changed parameter.

One run is shared by all tests of this file; what they change, they change in copies that share its DVC
cache, so that fetched models and generated samples are restored and not made again.
"""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from safetensors import safe_open

from pipeline.params import Params, load_params
from studies.sensitivity.params import read_study
from tests.rehearsal.starter import started

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent
MODEL = "smollm2-135m"
LAYERS, KV_HEADS = 30, 3
BASELINES = {"random", "streaming-llm", "lagkv", "keydiff", "knorm", "snapkv", "tova"}
DIALOGUES = ("--model", MODEL, "--trained-on", "dialogues")
UP_TO_DATE = "Data and pipelines are up to date."
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "KVP_"))}
ENVIRONMENT |= {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_OFFLINE": "1",
    # The order of sums, and so the last bits, depends on the number of threads.
    "OMP_NUM_THREADS": "1",
    **{f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def call(directory: Path, *command: str, environment: Mapping[str, str] = ENVIRONMENT) -> str:
    """Run a command that must succeed; returns what it printed."""
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}"
    return done.stdout


def stages_run(output: str) -> set[str]:
    """Names of the stages whose commands DVC started."""
    return set(re.findall(r"Running stage '([^']+)'", output))


def copy_tracked(directory: Path) -> None:
    """The tracked files, as they are in this checkout."""
    for name in call(REPOSITORY, "git", "ls-files", "-z").split("\0"):
        if (REPOSITORY / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, directory / name)


def share_sources(directory: Path) -> None:
    """Let a copy of the project use what this checkout has fetched, and leave there what it fetches."""
    sources = REPOSITORY / ".cache/sources"
    sources.mkdir(parents=True, exist_ok=True)
    (directory / ".cache").mkdir()
    (directory / ".cache/sources").symlink_to(sources)


@dataclass(frozen=True)
class Run:
    """A finished ``dvc repro``."""

    directory: Path
    output: str
    params: Params


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the copies lie; emptied afterwards, since each holds a model."""
    directory = tmp_path_factory.mktemp("pipeline")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def forked(space: Path) -> Iterator[dict[str, str]]:
    """An environment in which DVC's stages start as forks; those that are interrupted below start as processes do."""
    with started(space / "python", ENVIRONMENT) as commands:
        yield ENVIRONMENT | {"PATH": f"{commands}{os.pathsep}{ENVIRONMENT['PATH']}"}


@pytest.fixture(scope="module")
def run(space: Path, forked: dict[str, str]) -> Run:
    """The tracked files with the ci profile, as a repository of their own, after ``dvc repro``."""
    directory = space / "run"
    copy_tracked(directory)
    call(directory, sys.executable, "-m", "stages.profile", "ci")
    call(directory, "git", "init", "--quiet")
    call(directory, "git", "add", "--all")
    call(directory, "git", "commit", "--quiet", "--message", "Start")
    share_sources(directory)
    output = call(directory, "dvc", "repro", environment=forked)
    return Run(directory, output, load_params(directory / "params.yaml"))


@pytest.fixture(scope="module")
def copy(run: Run, space: Path) -> Path:
    """A second checkout, before any stage ran, that shares the DVC cache of the first."""
    directory = space / "copy"
    call(space, "git", "clone", "--quiet", str(run.directory), str(directory))
    call(directory, "dvc", "config", "--local", "cache.dir", str(run.directory / ".dvc/cache"))
    call(directory, "dvc", "config", "--local", "cache.type", "hardlink,copy")
    share_sources(directory)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def heed_ctrl_c() -> None:
    """Whoever started the tests in the background lets their children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(directory: Path, pattern: str, stage: str, *arguments: str) -> Path:
    """Start a stage and press Ctrl-C as soon as a file in .work matches ``pattern``; returns that file."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}", *arguments],
        cwd=directory, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    while not (found := list((directory / ".work").glob(pattern))):
        assert process.poll() is None, f"{stage} ended before it could be interrupted: {process.communicate()[1]}"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    return found[0]


def test_every_stage_ran_once(run: Run) -> None:
    matrix = [f"{MODEL}-{benchmark}" for benchmark in run.params.matrix.benchmark]
    expected = {"sources", f"model@{MODEL}", f"check@{MODEL}", "results", "report"}
    expected |= {
        f"{stage}@{entry}" for stage in ("samples", "traces", "evaluate", "score", "texts") for entry in matrix
    }
    expected |= {f"train@{entry}-{estimator}" for entry in matrix for estimator in run.params.matrix.estimator}
    assert stages_run(run.output) == expected
    assert "Traceback" not in run.output
    assert "Warning" not in run.output
    assert "it/s]" not in run.output  # no library's progress bar: the output is no terminal


def test_the_evaluation_has_every_policy_task_and_budget(run: Run) -> None:
    table = pl.read_parquet(run.directory / "results/evaluation.parquet")
    params = run.params
    matrix = params.matrix
    trained = {(f"kvp-{estimator}", name) for estimator in matrix.estimator for name in matrix.trained_on}
    evicting = {("oracle", None), *((name, None) for name in BASELINES), *trained}
    rows = set(table.select("policy", "trained_on", "budget").iter_rows())
    assert rows == {(*policy, budget) for policy in evicting for budget in params.evaluation.budgets} | {
        ("full", None, None)
    }
    ruler = table.filter(pl.col("benchmark") == "ruler")
    assert set(ruler["task"]) == set(params.benchmarks["ruler"].samples.tasks_of)
    assert set(ruler["metric"]) == {"string_match", "nll"}
    assert ruler.filter(metric="string_match")["value"].is_between(0, 1).all()
    assert ruler["value"].is_finite().all()
    dialogues = table.filter(pl.col("benchmark") == "dialogues")
    assert set(dialogues["metric"]) == {"nll"}
    assert dialogues["value"].is_finite().all()
    for part, count in ((ruler, 3), (dialogues, 2)):
        assert part["sample_id"].n_unique() == count
        assert part.height == count * len(rows) * part["metric"].n_unique()
    assert not table.is_duplicated().any()


def test_the_costs_have_every_head_and_the_oracles_are_the_least(run: Run) -> None:
    table = pl.read_parquet(run.directory / "results/cost.parquet")
    assert set(table.select("layer", "kv_head").iter_rows()) == {
        (layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)
    }
    per_head = table.group_by("layer", "kv_head").len()["len"]
    assert per_head.n_unique() == 1
    assert set(table["policy"]) == {"oracle", "kvp-exact", "kvp-rloo", *BASELINES}
    assert (table["cost"] >= table["optimal_cost"] * 0.9999).all()
    oracle = table.filter(pl.col("policy") == "oracle")
    assert (oracle["cost"] == oracle["optimal_cost"]).all()


def test_everything_that_is_promised_lies_where_it_should(run: Run) -> None:
    for pattern in ("metrics/*.json", "plots/*.csv", "reports/figures/*.png", "policies/*/*/*/README.md"):
        assert list(run.directory.glob(pattern)), pattern
    assert "<html" in (run.directory / "reports/index.html").read_text()
    assert not [*run.directory.rglob(".*.tmp"), *run.directory.rglob(".*.retired"), *run.directory.rglob(".publish")]


def test_what_is_large_lies_on_the_disk_once(run: Run) -> None:
    for name in ("models", "traces", "answers"):
        found = [path for path in (run.directory / name).rglob("*") if path.is_file()]
        # The cache has the same file under another name.
        assert {path.stat().st_nlink for path in found} == {2}, name


def test_a_second_repro_runs_nothing(run: Run) -> None:
    assert stages_run(call(run.directory, "dvc", "repro")) == set()
    assert UP_TO_DATE in call(run.directory, "dvc", "status")


def test_interrupted_traces_and_training_end_with_the_same_bytes(run: Run, copy: Path) -> None:
    output = call(copy, "dvc", "repro", f"samples@{MODEL}-dialogues", f"check@{MODEL}")
    assert stages_run(output) == set()  # restored from the cache of finished runs
    out = copy / "traces" / MODEL / "dialogues"
    marker = interrupt(copy, "traces-*/*/train/shard-00000.json", "traces", *DIALOGUES)
    assert not out.exists()
    shard = marker.with_name("layer=00") / "tokens-00000.parquet"
    before = shard.stat()
    call(copy, sys.executable, "-m", "stages.traces", *DIALOGUES)
    after = (out / "train/layer=00/tokens-00000.parquet").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # not made again
    assert files(out) == files(run.directory / "traces" / MODEL / "dialogues")

    out = copy / "policies" / MODEL / "dialogues/exact"
    arguments = (*DIALOGUES, "--estimator", "exact")
    checkpoint = interrupt(copy, "train-*/*/layer-*/checkpoint.safetensors", "train", *arguments)
    with safe_open(checkpoint, framework="pt") as stored:
        assert 0 < int(stored.metadata()["step"]) < run.params.train.steps
    assert not out.exists()
    call(copy, sys.executable, "-m", "stages.train", *arguments)
    assert files(out) == files(run.directory / "policies" / MODEL / "dialogues/exact")
    assert not checkpoint.exists()


def test_push_and_pull_restore_all_and_track_fills_mlflow(run: Run, space: Path) -> None:
    clone = space / "clone"
    call(run.directory, "dvc", "remote", "add", "--local", "--default", "storage", str(space / "storage"))
    call(run.directory, "dvc", "push")
    call(run.directory, "git", "add", "dvc.lock", "metrics", "plots")
    call(run.directory, "git", "commit", "--quiet", "--message", "Results")
    call(space, "git", "clone", "--quiet", str(run.directory), str(clone))
    call(clone, "dvc", "config", "--local", "cache.type", "hardlink,copy")
    call(clone, "dvc", "remote", "add", "--local", "--default", "storage", str(space / "storage"))
    call(clone, "dvc", "pull")
    assert UP_TO_DATE in call(clone, "dvc", "status")  # the studies have not run
    outs = "models checks samples traces policies answers scores texts results reports metrics plots"
    for name in outs.split():
        restored, original = ({str(path.relative_to(root)) for path in (root / name).rglob("*") if path.is_file()}
                              for root in (clone, run.directory))  # fmt: skip
        assert restored == original
        assert restored
    assert not (clone / "mlflow.db").exists()
    for _ in range(2):  # the second call adds nothing
        call(clone, sys.executable, "-m", "stages.track")
        with sqlite3.connect(clone / "mlflow.db") as database:
            roles = dict(database.execute("SELECT value, COUNT(*) FROM tags WHERE key = 'role' GROUP BY value"))
        database.close()
        trainings = len(run.params.matrix.trained_on) * len(run.params.matrix.estimator)
        assert roles == {
            "training": trainings,
            "head": trainings * LAYERS * KV_HEADS,
            "evaluation": 1,
            "policy": len(BASELINES) + len({"full", "oracle"}) + trainings,
        }
    shutil.rmtree(clone)


def test_the_studies_run_on_demand(run: Run, forked: dict[str, str]) -> None:
    studies = run.directory / "studies"
    output = call(studies, "dvc", "repro", environment=forked)
    expected = {"sensitivity_train", "sensitivity", f"latency@{MODEL}"}
    expected |= {f"sensitivity_traces@{MODEL}-{name}" for name in run.params.matrix.trained_on}
    assert stages_run(output) == expected
    assert (studies / f"reports/latency/{MODEL}/fig06_{MODEL}_latency.png").is_file()
    study = pl.read_parquet(studies / "results/sensitivity.parquet")
    assert set(study["layer"]) == set(read_study(run.params, studies / "params.yaml").layers)
    assert {"hidden", "hidden, no position"} <= set(study["value"])
    assert set(study.filter(pl.col("benchmark") == "ruler")["length"]) == {512, 1024}
    assert (studies / "reports/sensitivity/index.html").is_file()
    assert stages_run(call(studies, "dvc", "repro")) == set()
    assert UP_TO_DATE in call(run.directory, "dvc", "status")


def test_a_changed_training_reruns_what_depends_on_it_only(run: Run, forked: dict[str, str]) -> None:
    # Last, because it changes the run.
    output = call(run.directory, "dvc", "exp", "run", "--set-param", "train.steps=6", environment=forked)
    upstream = ("sources", "model@", "check@", "samples@", "traces@")
    expected = {stage for stage in stages_run(run.output) if not stage.startswith(upstream)}
    assert stages_run(output) == expected
    curves = pl.read_parquet(run.directory / "policies" / MODEL / "ruler/rloo/curves.parquet")
    assert curves["step"].n_unique() == 6
