"""Units of work: what a stage cuts itself into, and who does them. It knows no stage and no Ray.

A unit is named, idempotent and leaves its files in the work directory, last of all what :meth:`Job.is_done` looks for.
So an executor only schedules: what it did not finish, the next run does. Units are cut by parameters and samples, never
by workers, so that the same bytes come out whoever does them.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from pipeline.closure import Code
from pipeline.errors import PipelineError
from pipeline.executor.place import check_device, limit_threads

State = TypeVar("State")


class Advance(Protocol):
    """Reports that ``count`` more of what the progress counts is done, with an optional short status."""

    def __call__(self, count: int = 1, status: str = "") -> None:
        """Called from the thread that does the work; it may raise KeyboardInterrupt."""


class Job(Protocol[State]):
    """The units of one stage: a frozen dataclass of paths and sections of params.yaml, which travels to workers.

    Attributes
    ----------
    name
        For the progress and for sentences: the stage and its matrix entry.
    directory
        The stage's work directory (``pipeline/work.py``), relative to the repository's root.
    code
        What computes the units; workers must have the same.
    device
        Where a unit computes, as torch names it. A worker with ``cuda`` has one GPU of its own.
    memory
        Bytes of the machine's memory that a worker may need.
    together
        How many units the local executor does at a time, each in a thread. More than one for units that wait for a
        process of their own, on one CPU: a worker of Ray takes one as well, else as many as there are threads. All of
        them must end when what :meth:`open` gives is closed.
    """

    # Properties, because a frozen dataclass has no field that can be set.
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def directory(self) -> Path: ...  # noqa: D102
    @property
    def code(self) -> Code: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def memory(self) -> int: ...  # noqa: D102
    @property
    def together(self) -> int: ...  # noqa: D102

    def units(self) -> Mapping[str, int]:
        """Every unit, in the order in which they are begun -> how far it brings the progress."""

    def is_done(self, unit: str) -> bool:
        """Whether its last file is there."""

    def open(self) -> AbstractContextManager[State]:
        """What the units of one worker share, as a loaded model; entered once, before the worker's first unit."""

    def run(self, state: State, unit: str, advance: Advance) -> None:
        """Do a unit, from where an earlier try left it; ``advance`` is called with as much as :meth:`units` says."""


@dataclass(frozen=True)
class Executor:
    """Who does the units.

    Attributes
    ----------
    kind
        ``local``: this process, one after the other, or several where the job says so. ``ray``: workers of the Ray
        cluster that Ray finds as it always does (RAY_ADDRESS, one on this machine, else one that is started for the
        time), a process each.
    workers
        How many at a time; None for as many as the cluster has room for.
    """

    kind: Literal["local", "ray"] = "local"
    workers: int | None = None

    def check(self, device: str) -> None:
        """Refuse what cannot be, before anything is read.

        Raises
        ------
        PipelineError
            This machine lacks the device, or the options contradict each other.
        """
        if self.kind == "local":
            if self.workers not in (None, 1):
                raise PipelineError(
                    f"--workers {self.workers}: the local executor is one worker; add --executor ray for more."
                )
            check_device(device)
        elif ":" in device:
            raise PipelineError(
                f"--device {device}: a Ray worker sees one GPU, which Ray picks; write --device {device.split(':')[0]}."
            )


LOCAL = Executor()


def unseen(count: int = 1, status: str = "") -> None:
    """Progress that is shown nowhere, an :class:`Advance`."""


def run_units(job: Job[State], units: Mapping[str, int], executor: Executor, advance: Advance) -> None:
    """Do every unit of a job that is not done yet.

    Parameters
    ----------
    units
        :meth:`Job.units`, which may have to read files.

    Raises
    ------
    PipelineError
        A unit's own; or the cluster has no worker that could do it as this machine would.
    """
    todo = []
    for unit, size in units.items():
        if job.is_done(unit):
            advance(size)
        else:
            todo.append(unit)
    if not todo:
        return
    if executor.kind == "ray":
        from pipeline.executor.on_ray import run_on_ray

        run_on_ray(job, todo, executor.workers, advance)
        return
    limit_threads()
    if job.together > 1:
        _run_together(job, todo, advance)
        return
    with job.open() as state:
        for unit in todo:
            job.run(state, unit, advance)


def _run_together(job: Job[State], units: Sequence[str], advance: Advance) -> None:
    """Do units in threads; what the first one to fail says is raised."""
    turn = threading.Lock()

    def in_turn(count: int = 1, status: str = "") -> None:
        with turn:
            advance(count, status)

    # Left from the inside: what the units share is closed, which ends those at work, and only then waited for them.
    with ThreadPoolExecutor(job.together) as pool, job.open() as state:
        try:
            running = [pool.submit(job.run, state, unit, in_turn) for unit in units]
            for unit in as_completed(running):
                unit.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
