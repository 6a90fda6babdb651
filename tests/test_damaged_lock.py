"""A dvc.lock that a kill left half-written, which DVC refuses: ``make repro`` moves it away, and runs are restored.

Mechanism: one line of the Makefile, tried here as it stands there; that DVC restores finished runs without a lock file
is what tests/test_pipeline.py does in its copies.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_pipeline import ENVIRONMENT, REPOSITORY, call

PIPELINE = "stages: {one: {cmd: echo run >> log && echo made > out, deps: [input], outs: [out]}}\n"


def heal(directory: Path) -> None:
    lines = (REPOSITORY / "Makefile").read_text().splitlines()
    (line,) = (line.strip() for line in lines if "dvc.lock.damaged" in line)
    subprocess.run(["sh", "-c", line], cwd=directory, env=ENVIRONMENT, check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose one stage has run."""
    directory = tmp_path_factory.mktemp("finished")
    call(directory, "dvc", "init", "--quiet", "--no-scm")
    (directory / "dvc.yaml").write_text(PIPELINE)
    (directory / "input").write_text("")
    call(directory, "dvc", "repro")
    heal(directory)
    assert not (directory / "dvc.lock.damaged").exists()  # a good one stays
    return directory


# A part that DVC can read may lack what one stage gave: that stage runs again.
@pytest.mark.parametrize(("part", "runs"), [(0.0, 1), (0.5, 1), (0.9, 2)])
def test_a_half_written_lock_file_costs_one_stage_at_most(
    part: float, runs: int, finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project)
    lock = project / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(whole[: int(part * len(whole))])
    heal(project)
    call(project, "dvc", "repro")
    assert lock.read_text() == whole
    assert len((project / "log").read_text().splitlines()) <= runs
