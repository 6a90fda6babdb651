"""The tasks of a split as units: two at a time, ended together, each made once; with scripts that need no second."""

import json
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.executor.units import LOCAL, run_units, unseen
from pipeline.ruler.job import RulerJob
from tests.executor.jobs import until
from tests.ruler.scripts import MAKES, ROW, is_gone, job_of, write_wheel

WAITS = """
import os, signal, time
signal.signal(signal.SIGALRM, signal.SIG_IGN)
os.fork()
print("waiting", flush=True)
time.sleep(3600)
"""
# Once the other is at work.
FAILS = """
import glob, os, time
while not any(map(os.path.getsize, glob.glob("../../.test-waits-0.*.tmp/run/log"))):
    time.sleep(0.02)
raise SystemExit("no words left")
"""
SCRIPTS = {"makes": MAKES, "again": MAKES, "waits": WAITS, "fails": FAILS}
MADE = ROW | {"seed": 7}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return write_wheel(tmp_path / "wheel", SCRIPTS)


@pytest.fixture
def job(wheel: Path, smollm2: Path, tmp_path: Path) -> RulerJob:
    return job_of(wheel, smollm2, tmp_path / "work", "makes", "again")


def runs(job: RulerJob, task: str) -> list[Path]:
    """Directories of the scripts of a task that did not end well."""
    return list((job.directory / "scratch").glob(f".test-{task}-0.*.tmp/run"))


def assert_ended(job: RulerJob) -> None:
    (run,) = runs(job, "waits")
    until(lambda: is_gone(int((run / "job.pid").read_text())), "the end of a script")
    assert not job.is_done("waits")


def test_rows_lie_in_files_and_nothing_else_is_left(job: RulerJob) -> None:
    said: list[tuple[int, str]] = []
    run_units(job, job.units(), LOCAL, lambda count=1, status="": said.append((count, status)))
    assert sorted(said) == [(1, "test again"), (1, "test makes")]
    assert job.gather() == {"makes": [MADE], "again": [MADE]}
    assert not list((job.directory / "scratch").iterdir())


def test_a_finished_task_is_not_made_again(job: RulerJob) -> None:
    rows = job.directory / "rows/test/makes.json"
    rows.parent.mkdir(parents=True)
    rows.write_text(json.dumps([MADE | {"input": "kept"}]))
    run_units(job, job.units(), LOCAL, unseen)
    assert job.gather() == {"makes": [MADE | {"input": "kept"}], "again": [MADE]}


@pytest.mark.parametrize(
    ("content", "message"),
    [('[{"index"', r"makes\.json cannot be read \(.+\); delete it and run again\."), ("{}", "holds no list of rows")],
)
def test_damaged_rows_are_one_sentence(content: str, message: str, job: RulerJob) -> None:
    run_units(job, job.units(), LOCAL, unseen)
    (job.directory / "rows/test/makes.json").write_text(content)
    with pytest.raises(PipelineError, match=message):
        job.gather()


def test_the_failure_of_one_task_ends_the_script_of_the_other(wheel: Path, smollm2: Path, tmp_path: Path) -> None:
    job = job_of(wheel, smollm2, tmp_path / "work", "waits", "fails", "makes")
    with pytest.raises(PipelineError, match=r"failed on fails: no words left \(see ") as caught:
        run_units(job, job.units(), LOCAL, unseen)
    assert_ended(job)
    (named,) = runs(job, "fails")
    assert str(named.parent) in str(caught.value)


def test_ctrl_c_ends_the_scripts(wheel: Path, smollm2: Path, tmp_path: Path) -> None:
    job = job_of(wheel, smollm2, tmp_path / "work", "waits", "makes", "again")

    def interrupt(count: int = 1, status: str = "") -> None:
        until(lambda: any((run / "log").stat().st_size for run in runs(job, "waits")), "the other script")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_units(job, job.units(), LOCAL, interrupt)
    assert_ended(job)
    assert job.is_done("makes")
