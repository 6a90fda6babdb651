"""A dvc.lock that a kill left half-written, which DVC refuses: ``make repro`` moves it away, and runs are restored.

Mechanism: one line of the Makefile, tried here as it stands there; that DVC restores finished runs without a lock file
is what tests/test_pipeline.py does in its copies.
"""

import subprocess
from pathlib import Path

import pytest

from tests.test_pipeline import ENVIRONMENT, REPOSITORY, call

PIPELINE = "stages: {one: {cmd: echo run >> log && echo made > out, deps: [input], outs: [out]}}\n"


def heal(directory: Path) -> None:
    lines = (REPOSITORY / "Makefile").read_text().splitlines()
    (line,) = (line.strip() for line in lines if "dvc.lock.damaged" in line)
    subprocess.run(["sh", "-c", line], cwd=directory, env=ENVIRONMENT, check=True)


# A part that DVC can read may lack what one stage gave: that stage runs again.
@pytest.mark.parametrize(("part", "runs"), [(0.0, 1), (0.5, 1), (0.9, 2)])
def test_a_half_written_lock_file_costs_one_stage_at_most(part: float, runs: int, tmp_path: Path) -> None:
    call(tmp_path, "dvc", "init", "--quiet", "--no-scm")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "input").write_text("")
    call(tmp_path, "dvc", "repro")
    heal(tmp_path)
    lock = tmp_path / "dvc.lock"
    whole = lock.read_text()
    assert not (tmp_path / "dvc.lock.damaged").exists()  # a good one stays
    lock.write_text(whole[: int(part * len(whole))])
    heal(tmp_path)
    call(tmp_path, "dvc", "repro")
    assert lock.read_text() == whole
    assert len((tmp_path / "log").read_text().splitlines()) <= runs
