"""Units done by workers of a Ray cluster. The only file that knows Ray, which is imported where it is used.

A worker is an actor: a process with one unit at a time. One that dies, with its node or alone, is replaced, and its
unit begins again where its files say. Nothing travels through Ray but the job's description and the progress: results
lie in the work directory, which every node must see. Before a worker loads anything it compares the directory, the
code and the versions of the libraries with those of the process that sent it.
"""

import logging
import os
import pickle
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.closure import ROOT, code_state
from pipeline.errors import PipelineError, one_line
from pipeline.executor.place import threads
from pipeline.executor.units import Advance, Job
from pipeline.files import remove, write_text

# A unit that takes its worker with it so often is no victim.
TRIES = 3
# Seconds between looks at whether a node is left that could start a worker.
_LOOK = 10.0
# Seconds until a network disk shows here what a worker wrote there.
_SHOWN = 90.0
# For a cluster of our own. Nothing of ours goes through Ray's object store, and this is about the least it takes.
_OBJECT_STORE = 100 * 2**20


@contextmanager
def _connected() -> Iterator[Any]:
    """Ray, connected to the cluster that RAY_ADDRESS names or that runs on this machine, else to one of our own."""
    # Read when Ray is imported: this project sends nothing to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise PipelineError(
            f"--executor ray needs Ray ({one_line(error)}); pip install --constraint constraints.txt '.[ray]', on "
            "every node."
        ) from None
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise PipelineError(
            f"RAY_ADDRESS={address} is that of Ray's client, through which no files are seen; run this on a node of "
            "the cluster, with RAY_ADDRESS=auto."
        )
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=30).close()
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"Nothing answers at RAY_ADDRESS={address} ({one_line(error)}); start Ray there, or unset it."
        ) from None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        try:
            ray.init(**quiet, **(own if address == "local" else {"address": address or "auto"}))
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address or not isinstance(error, ConnectionError):
                raise PipelineError(
                    f"The Ray cluster at {address or 'this machine'} cannot be used ({one_line(error)}); start one "
                    "with this Ray (ray start --head), or set RAY_ADDRESS=local for one on this machine alone."
                ) from None
            ray.init(**quiet, **own)
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _errand(job: Job[Any]) -> Iterator[dict[str, Any]]:
    """What a worker is sent with: plain values, which it can read before it knows that our code is there."""
    secret = secrets.token_hex(16)
    # A new name: a network disk may remember for a while that an old one was not there.
    token = Path.cwd() / job.directory / f".{secret}.tmp"
    write_text(token, secret)
    try:
        yield {
            "folder": str(Path.cwd()),
            "token": str(token),
            "secret": secret,
            "root": str(ROOT),
            "code": str(Path(job.code.file).resolve()),
            "entries": dict(job.code.entries),
            "state": code_state(job.code),
            "job": pickle.dumps(job),
        }
    finally:
        remove(token)


def _needs(job: Job[Any], nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a worker takes of its node: a GPU and its share of the CPUs, or as many CPUs as this process has threads.

    With as many threads as the local executor would have, sums are added in the same order. Where that one does
    several units at a time, none of them adds up anything with threads.
    """
    gpus = float(job.device == "cuda")
    shares = [node["CPU"] // node["GPU"] for node in nodes if node.get("GPU") and node.get("CPU")]
    cpus = max(1.0, min(shares, default=1.0)) if gpus else float(threads() if job.together == 1 else 1)
    return {"CPU": cpus, "GPU": gpus, "memory": float(job.memory)}


def _room(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers a node holds."""
    return int(min(node.get(name, 0.0) // amount for name, amount in needs.items() if amount))


def _await_markers(job: Job[Any], units: Sequence[str]) -> None:
    """Wait until everything that workers have done is seen here."""
    deadline = time.monotonic() + _SHOWN
    while missing := [unit for unit in units if not job.is_done(unit)]:
        if time.monotonic() > deadline:
            raise PipelineError(
                f"{job.name}: unit {missing[0]} was done by a worker, but {job.directory} does not show it here; mount "
                "the shared disk so that new files are seen at once (for NFS: lookupcache=positive) and run again."
            )
        time.sleep(0.5)


class _Worker:
    """An actor, what is awaited of it, and its unit with how far that has come."""

    def __init__(self, actor: Any, errand: dict[str, Any]) -> None:
        self.actor = actor
        self.awaited: Any = actor.prepare.remote(errand)
        self.unit: str | None = None
        self.counted = 0

    def begin(self, unit: str) -> None:
        """Send it a unit."""
        self.unit, self.counted = unit, 0
        self.awaited = self.actor.run.remote(unit)


def run_on_ray(job: Job[Any], units: Sequence[str], workers: int | None, advance: Advance) -> None:
    """Do ``units`` on ``workers`` of the cluster, at most one each; None for as many as it has room for.

    Raises
    ------
    PipelineError
        Ray is not installed, there is no cluster, or none of its nodes has room for a worker; a node sees another
        directory or has other code; a unit has failed, or its worker died :data:`TRIES` times.
    """
    with _connected() as ray, _errand(job) as errand:
        crew = _Crew(ray, job, errand, advance)
        try:
            crew.do(units, workers)
        finally:
            crew.dismiss()
    _await_markers(job, units)


class _Crew:
    """The workers of one job, and who does what."""

    def __init__(self, ray: Any, job: Job[Any], errand: dict[str, Any], advance: Advance) -> None:
        self.ray, self.job, self.errand, self.advance = ray, job, errand, advance
        self.needs = _needs(job, self._nodes())
        self.actor = ray.remote(_actor_class()).options(
            num_cpus=self.needs["CPU"], num_gpus=self.needs["GPU"], memory=self.needs["memory"]
        )
        # Alive: each is either awaited, starting or at work, or idle.
        self.awaited: list[_Worker] = []
        self.idle: list[_Worker] = []
        self.deaths: Counter[str] = Counter()

    def do(self, units: Sequence[str], workers: int | None) -> None:
        """Keep so many workers at work until no unit is left."""
        self._require_room()
        todo = deque(units)
        while todo or any(worker.unit for worker in self.awaited):
            while todo and self.idle:
                worker = self.idle.pop()
                worker.begin(todo.popleft())
                self.awaited.append(worker)
            waiting = len(todo) - sum(worker.unit is None for worker in self.awaited)
            if waiting > 0:  # else the cluster need not be asked, once for every step that a worker reports
                # Nodes may join while others are at work.
                wanted = workers or sum(_room(node, self.needs) for node in self._nodes())
                for _ in range(min(wanted - len(self.awaited), waiting)):
                    self.awaited.append(_Worker(self.actor.remote(), self.errand | {"threads": int(self.needs["CPU"])}))
            for worker in self._ready():
                if (lost := self._hear(worker)) is not None:
                    todo.appendleft(lost)

    def dismiss(self) -> None:
        """End every worker at once; what a unit has finished is in files."""
        for worker in (*self.awaited, *self.idle):
            self.ray.kill(worker.actor)

    def _ready(self) -> list[_Worker]:
        """Those who have something to say; none where nobody has for a while."""
        ready, _ = self.ray.wait([worker.awaited for worker in self.awaited], timeout=_LOOK)
        if not ready and not any(worker.unit for worker in self.awaited):
            self._require_room()
        return [worker for worker in self.awaited if any(worker.awaited is one for one in ready)]

    def _require_room(self) -> None:
        nodes = self._nodes()
        if not any(_room(node, self.needs) for node in nodes):
            cpus, gpus, memory = self.needs["CPU"], self.needs["GPU"], self.needs["memory"] / 2**30
            raise PipelineError(
                f"No node of the Ray cluster ({len(nodes)} alive) has the {cpus:g} CPUs, {gpus:g} GPUs and "
                f"{memory:.1f} GiB of memory that a worker of {self.job.name} takes; start such a node, or let workers "
                "take fewer CPUs (OMP_NUM_THREADS, without GPUs) or, in training, less memory (KVP_CACHE_GB)."
            )

    def _hear(self, worker: _Worker) -> str | None:
        """Take in what a worker says; returns the unit that was lost with it."""
        unit, errors = worker.unit, self.ray.exceptions
        try:
            if unit is None:
                if (refusal := self.ray.get(worker.awaited)) is not None:
                    raise PipelineError(refusal)
                self.deaths.pop("", None)
            else:
                count, status = self.ray.get(next(worker.awaited))
                worker.counted += count
                self.advance(count, status)
                return None
        except StopIteration:  # the unit is done
            worker.unit = None
        except errors.RayTaskError as error:
            raise error.cause from (None if isinstance(error.cause, PipelineError) else error)
        except (
            errors.RayActorError,
            errors.NodeDiedError,
            errors.ObjectLostError,
            errors.OutOfMemoryError,
            errors.WorkerCrashedError,
        ) as death:
            self.awaited.remove(worker)
            self.ray.kill(worker.actor)  # it may only be out of reach
            self._mourn(unit, death)
            # What its unit had reported is done again, or found done.
            self.advance(-worker.counted)
            return unit
        self.awaited.remove(worker)
        self.idle.append(worker)
        return None

    def _mourn(self, unit: str | None, death: Exception) -> None:
        """Count a death; too many of one kind have a reason that another try does not remove."""
        when = "before its first unit" if unit is None else f"in unit {unit}"
        self.deaths[unit or ""] += 1
        if self.deaths[unit or ""] == TRIES:
            raise PipelineError(
                f"{self.job.name}: a worker died {when}, {TRIES} times ({one_line(death)}); look for the reason in "
                "Ray's logs (its machine may lack memory) and run again, finished pieces are kept."
            )
        logging.getLogger(__name__).warning("%s: a worker died %s; another takes its place.", self.job.name, when)

    def _nodes(self) -> list[Mapping[str, float]]:
        """What each living node has, of everything."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]


def _actor_class() -> type:
    """The actor. It travels by value, since our code may not be where it arrives: nothing outside is its to use."""

    class Worker:
        def prepare(self, errand: Any) -> str | None:
            """Look around, then load what the units need; returns a sentence where this is the wrong place."""
            import os
            import pickle
            import sys
            from contextlib import ExitStack
            from pathlib import Path

            node = os.uname().nodename
            try:
                os.chdir(errand["folder"])
                seen = Path(errand["token"]).read_text()
            except OSError:
                seen = ""
            if seen != errand["secret"]:
                return (
                    f"Node {node} does not see {errand['folder']} as this machine does; put the project on a disk "
                    "that all nodes share, at the same path."
                )
            sys.path.insert(0, errand["root"])
            # Before torch is loaded: the order of sums, and so the last bits, depends on it.
            os.environ["OMP_NUM_THREADS"] = str(errand["threads"])
            try:
                from pipeline.closure import ROOT, Code, code_state
                from pipeline.executor.place import check_device, difference, limit_threads

                if str(ROOT) != errand["root"]:
                    raise ImportError(f"pipeline is that of {ROOT}")
                code = Code(errand["code"], errand["entries"])
                refusal = difference(node, errand["state"], code_state(code))
            except ImportError as error:
                refusal = (
                    f"Node {node} cannot use the code in {errand['root']} ({error}); start Ray there in the same "
                    "environment as here."
                )
            if refusal is not None:
                return refusal
            self.job = pickle.loads(errand["job"])
            check_device(self.job.device)
            limit_threads()
            self.opened = ExitStack()
            self.state = self.opened.enter_context(self.job.open())
            return None

        def run(self, unit: str) -> Any:
            """Do a unit, saying how far it is."""
            import queue
            import threading

            said: Any = queue.SimpleQueue()

            def work() -> None:
                try:
                    self.job.run(self.state, unit, lambda count=1, status="": said.put((count, status)))
                    said.put(None)
                except BaseException as error:
                    said.put(error)

            threading.Thread(target=work, daemon=True).start()
            while (heard := said.get()) is not None:
                if isinstance(heard, BaseException):
                    raise heard
                yield heard

    return Worker
