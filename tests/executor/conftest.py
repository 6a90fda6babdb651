"""A Ray cluster of two machines with one CPU each, and programs that use it."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

MACHINE = {"num_cpus": 1, "memory": 4 * 2**30, "object_store_memory": 80 * 2**20}
Start = Callable[..., "subprocess.Popen[str]"]


class Machines:
    """A head, to which programs connect, and one more machine that can be taken away."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # A machine that is gone refuses at once; a slow one has as much time as ever.
        noticed = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
        self.cluster = Cluster()
        self.cluster.add_node(**MACHINE, include_dashboard=False, _system_config=noticed)
        self.other: Any = None

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def complete(self) -> None:
        """Start the other machine, if it is not there."""
        if self.other is None:
            self.other = self.cluster.add_node(**MACHINE)

    def kill(self) -> None:
        """Take the other machine away, with all that runs there."""
        self.cluster.remove_node(self.other, allow_graceful=False)
        self.other = None


@pytest.fixture(scope="session")
def _machines() -> Iterator[Machines]:
    pytest.importorskip("ray")
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        machines = Machines()
        yield machines
        machines.cluster.shutdown()


@pytest.fixture
def machines(_machines: Machines) -> Machines:
    _machines.complete()
    return _machines


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("local", "ray", "doors"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def start(machines: Machines, folder: Path) -> Iterator[Start]:
    """Start a program that does a job in ``folder``, with options; what was never waited for is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(job: Any, *options: str, program: str = "", **environment: str) -> "subprocess.Popen[str]":
        (folder / "job").write_bytes(pickle.dumps(job))
        command = ["-c", program] if program else ["-m", "tests.executor.drive"]
        started.append(
            subprocess.Popen(
                [sys.executable, *command, "job", "--executor", "ray", *options],
                cwd=folder,
                env=os.environ
                | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": machines.address}
                | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def files(directory: Path) -> dict[str, bytes]:
    """What a job left."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def finish(process: "subprocess.Popen[str]", code: int = 0) -> list[str]:
    """Lines of a program's stderr."""
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors
    return [line for line in errors.splitlines() if line]


def sentence(process: "subprocess.Popen[str]") -> str:
    """What a program that refuses says."""
    (line,) = finish(process, 1)
    return line
