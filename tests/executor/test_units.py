"""The local executor, what it refuses, and what workers are held against; without Ray."""

import dataclasses
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.executor.on_ray import _needs, run_on_ray
from pipeline.executor.place import difference, threads
from pipeline.executor.units import LOCAL, Advance, Executor, run_units, unseen
from tests.executor.jobs import PATIENCE, Squares


def do(job: Squares) -> list[int]:
    """Do a job here; returns what its progress said."""
    said: list[int] = []
    run_units(job, job.units(), LOCAL, lambda count=1, status="": said.append(count))
    return said


def test_what_is_done_is_neither_done_again_nor_opened(folder: Path) -> None:
    job = Squares(folder / "local", count=3)
    assert do(job) == [1] * 6
    (job.directory / "1.done").unlink()
    (job.directory / "0.done").write_text("kept")
    assert sorted(do(job)) == [1, 1, 2, 2]
    assert (job.directory / "0.done").read_text() == "kept"
    assert (job.directory / "1.done").read_text() == "1 ** 2 = 1"

    @dataclasses.dataclass(frozen=True)
    class Closed(Squares):
        @contextmanager
        def open(self) -> Iterator[int]:
            raise AssertionError("nothing is left to do")
            yield

    assert do(Closed(job.directory, count=3)) == [2, 2, 2]


def test_a_failure_leaves_the_later_units_for_the_next_run(folder: Path) -> None:
    with pytest.raises(PipelineError, match=r"unit 1 cannot be done; drop it\."):
        do(Squares(folder / "local", count=3, fails="1"))
    assert {path.name for path in (folder / "local").iterdir()} == {"0.half", "0.done"}


def test_units_that_may_are_done_together(folder: Path) -> None:
    both = threading.Barrier(2)

    class Meeting(Squares):
        def run(self, state: int, unit: str, advance: Advance) -> None:
            both.wait(PATIENCE)
            super().run(state, unit, advance)

    assert do(Meeting(folder / "local", together=2)) == [1] * 8
    assert {path.stem for path in (folder / "local").glob("*.done")} == {"0", "1", "2", "3"}


@pytest.mark.parametrize(("together", "cpus"), [(1, 3.0), (2, 1.0)])
def test_what_is_done_together_takes_one_cpu_of_a_node(
    together: int, cpus: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _needs(Squares(folder, together=together), [{"CPU": 4.0, "GPU": 1.0}])["CPU"] == cpus


@pytest.mark.parametrize(
    ("executor", "device", "sentence"),
    [
        (Executor("local", 2), "cpu", r"--workers 2: the local executor is one worker; add --executor ray for more\."),
        (
            Executor("ray"),
            "cuda:1",
            r"--device cuda:1: a Ray worker sees one GPU, which Ray picks; write --device cuda",
        ),
        (LOCAL, "gpu7", r"--device gpu7 cannot be used \(.+\); choose another\."),
    ],
)
def test_who_and_where_must_fit(executor: Executor, device: str, sentence: str) -> None:
    with pytest.raises(PipelineError, match=sentence):
        executor.check(device)
    Executor("ray", 2).check("cuda")  # the workers' machines have it, or say that they have not


@pytest.mark.parametrize("said", ["0", "two", "4,2", ""])
def test_threads_that_are_no_number_are_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    with pytest.raises(PipelineError, match=rf"OMP_NUM_THREADS={said}: it should be a number of threads, 1 or more"):
        threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads() == 3


def test_without_ray_there_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        PipelineError, match=r"--executor ray needs Ray \(.+\); pip install .*'\.\[ray\]', on every node"
    ):
        run_on_ray(Squares(folder / "ray"), ["0"], None, unseen)


OURS = {"files": {"a.py": "1", "b.py": "2"}, "libraries": {"torch": "2.13.0"}}


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        (OURS, None),
        (
            OURS | {"files": {"a.py": "1", "b.py": "3"}},
            "Node n has another b.py than this machine; let all nodes run one",
        ),
        (OURS | {"files": {"a.py": "1"}}, "Node n has another b.py than this machine; let all nodes run one"),
        (OURS | {"libraries": {"torch": "2.12.0"}}, "Node n has torch 2.12.0 and this machine 2.13.0, which may give"),
        (OURS | {"libraries": {}}, "Node n has torch none and this machine 2.13.0, which may give"),
    ],
)
def test_what_differs_is_named(theirs: dict[str, dict[str, str]], sentence: str | None) -> None:
    found = difference("n", OURS, theirs)
    assert found is None if sentence is None else found is not None and found.startswith(sentence)
