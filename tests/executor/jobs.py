"""Jobs for workers to do, with doors at which they wait."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.closure import ROOT, Code
from pipeline.errors import PipelineError
from pipeline.executor.units import Advance

CODE = Code(str(ROOT / "pipeline/tables.py"))
PATIENCE = 600.0
"""Seconds for what takes one or two where nothing else runs."""


def until(seen: Callable[[], object], what: str, process: "subprocess.Popen[str] | None" = None) -> None:
    """Wait for ``seen()`` to be true, which ``process`` works on."""
    deadline = time.monotonic() + PATIENCE
    while not seen():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{what} did not come: {process.communicate()[1]}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come")
        time.sleep(0.02)


@dataclass(frozen=True)
class Squares:
    """A unit writes the square of its number, in two halves; ``fails`` raises, ``dies`` kills its process."""

    directory: Path
    count: int = 4
    fails: str = ""
    dies: str = ""
    name: str = "squares"
    device: str = "cpu"
    memory: int = 2**20
    together: int = 1
    code: Code = CODE

    def units(self) -> Mapping[str, int]:
        return {str(number): 2 for number in range(self.count)}

    def is_done(self, unit: str) -> bool:
        return (self.directory / f"{unit}.done").exists()

    @contextmanager
    def open(self) -> Iterator[int]:
        yield 2

    def run(self, state: int, unit: str, advance: Advance) -> None:
        if unit == self.fails:
            raise PipelineError(f"unit {unit} cannot be done; drop it.")
        half = self.directory / f"{unit}.half"
        if not half.exists():
            half.write_text(f"{unit} ** {state} = ")
        advance(1, "half")
        if unit == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        (self.directory / f"{unit}.done").write_text(half.read_text() + str(int(unit) ** state))
        advance()


@dataclass(frozen=True)
class Behind:
    """Another job, behind doors: a unit waits there until the file ``open`` is in ``doors``.

    The door is at its ``step``-th advance; 0: before it begins.

    Each that comes there leaves a file ``UNIT.PROCESS`` in ``doors``. ``shut`` names the units that wait.
    """

    job: Any
    doors: Path
    shut: tuple[str, ...]
    step: int = 1

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # of a job that is not unpickled yet
        return getattr(self.job, name)

    def run(self, state: Any, unit: str, advance: Advance) -> None:
        passed = 0

        def count_steps(count: int = 1, status: str = "") -> None:
            nonlocal passed
            advance(count, status)
            passed += 1
            self._arrive(unit, passed)

        self._arrive(unit, passed)
        self.job.run(state, unit, count_steps)

    def _arrive(self, unit: str, step: int) -> None:
        if step == self.step:
            (self.doors / f"{unit}.{os.getpid()}").touch()
            if unit in self.shut:
                until((self.doors / "open").exists, "the opening of the doors")

    def came(self) -> dict[str, list[int]]:
        """Unit -> the processes that came to its door."""
        found: dict[str, list[int]] = {}
        for path in sorted(self.doors.iterdir()):
            if path.suffix:
                found.setdefault(path.stem, []).append(int(path.suffix[1:]))
        return found
