import shutil
from pathlib import Path

import pytest

from pipeline.reporting.run import Run
from tests.reporting.synthetic import make_run, write_results


@pytest.fixture
def run_directory(finished: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a small made-up run, as current directory."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A made-up run that no test changes."""
    root = tmp_path_factory.mktemp("run")
    return root, make_run(write_results(root))
