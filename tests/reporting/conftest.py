from pathlib import Path

import pytest

from pipeline.params import Params
from tests.reporting.synthetic import write_results


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a small made-up run, as current directory."""
    write_results(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """A made-up run that no test changes."""
    root = tmp_path_factory.mktemp("run")
    return root, write_results(root)
