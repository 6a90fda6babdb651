"""Units on a Ray cluster of two machines: the bytes of the local run whatever dies, a sentence for what cannot be."""

import os
import re
import signal
from pathlib import Path

import pytest

from pipeline.executor.on_ray import TRIES
from pipeline.executor.units import LOCAL, run_units, unseen
from tests.executor.conftest import Machines, Start, files, finish, sentence
from tests.executor.jobs import Behind, Squares, until


@pytest.fixture
def expected(folder: Path) -> dict[str, bytes]:
    """What the local executor leaves of four squares."""
    job = Squares(folder / "local")
    run_units(job, job.units(), LOCAL, unseen)
    assert len(files(folder / "local")) == 8
    return files(folder / "local")


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()


def test_a_machine_and_a_worker_die_in_their_units(
    machines: Machines, start: Start, folder: Path, expected: dict[str, bytes]
) -> None:
    job = Behind(Squares(folder / "ray"), folder / "doors", shut=("0", "1"))
    process = start(job)
    until(lambda: len(job.came()) == 2, "both workers", process)
    workers = [one for (one,) in job.came().values()]
    machines.kill()  # and with it one of the units
    until(lambda: any(map(gone, workers)), "the death of a worker")
    (survivor,) = (worker for worker in workers if not gone(worker))
    os.kill(survivor, signal.SIGKILL)  # now the other
    (folder / "doors/open").touch()
    lines = finish(process)
    assert files(folder / "ray") == expected
    came = {unit: len(processes) for unit, processes in job.came().items()}
    assert came == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert sum("a worker died in unit" in line for line in lines) == 2
    # What the dead had done of it is not counted twice.
    assert [line for line in lines if line.startswith("squares: 8 of 8")]


def test_ctrl_c_ends_the_workers_and_the_next_run_continues(
    machines: Machines, start: Start, folder: Path, expected: dict[str, bytes]
) -> None:
    job = Behind(Squares(folder / "ray"), folder / "doors", shut=("1", "2"))
    process = start(job)
    until(lambda: {"1", "2"} <= set(job.came()), "both doors", process)
    process.send_signal(signal.SIGINT)
    assert finish(process, 130)[-1] == "interrupted; run again to continue where it stopped."
    for (worker,) in job.came().values():
        until(lambda worker=worker: gone(worker), "the end of a worker")
    assert {"0.done"} <= set(files(folder / "ray")) < set(expected)
    (folder / "doors/open").touch()
    finish(start(job, "--workers", "1"))
    assert files(folder / "ray") == expected
    assert len(job.came()["0"]) == 1


def test_what_a_unit_says_ends_the_run(start: Start, folder: Path) -> None:
    job = Behind(Squares(folder / "ray", count=3, fails="1"), folder / "doors", shut=("0",))
    assert finish(start(job), 1)[-1] == "error: unit 1 cannot be done; drop it."
    assert "0.done" not in files(folder / "ray")


def test_a_unit_that_kills_every_worker_is_named(start: Start, folder: Path) -> None:
    *warnings, last = finish(start(Squares(folder / "ray", count=1, dies="0"), "--workers", "1"), 1)
    assert len([line for line in warnings if "a worker died in unit 0" in line]) == TRIES - 1
    assert last.startswith(f"error: squares: a worker died in unit 0, {TRIES} times (")
    assert last.endswith("and run again, finished pieces are kept.")


ELSEWHERE = """
import sys
from pipeline.executor import on_ray
from tests.executor.drive import main, run
{change}
run(main, checked=False)
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "on_ray.write_text = lambda path, text: path.write_text('of another disk')",
            "does not see {folder} as this machine does; put the project on a disk that all nodes share",
        ),
        ("on_ray.ROOT = '/nowhere'", "cannot use the code in /nowhere (pipeline is that of "),
        (
            "state = on_ray.code_state\n"
            "on_ray.code_state = lambda code: state(code) | {'libraries': {'polars': '0.1'}}",
            "and this machine 0.1, which may give other bytes; install the same on all nodes",
        ),
        (
            "state = on_ray.code_state\n"
            "on_ray.code_state = lambda code: state(code) | {'files': {'pipeline/tables.py': '0'}}",
            "has another pipeline/tables.py than this machine; let all nodes run one checkout",
        ),
    ],
    ids=["directory", "root", "library", "file"],
)
def test_a_worker_elsewhere_is_refused(change: str, message: str, start: Start, folder: Path) -> None:
    process = start(Squares(folder / "ray"), "--workers", "1", program=ELSEWHERE.format(change=change))
    line = sentence(process)
    assert line.startswith(f"error: Node {os.uname().nodename} ")
    assert message.format(folder=folder) in line
    assert not files(folder / "ray")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RAY_ADDRESS": "ray://head:10001"}, r"is that of Ray's client"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, r"Nothing answers at RAY_ADDRESS=127\.0\.0\.1:1 \("),
        ({"OMP_NUM_THREADS": "3"}, r"No node of the Ray cluster \(2 alive\) has the 3 CPUs, 0 GPUs and 0\.0 GiB"),
    ],
    ids=["client", "nobody", "threads"],
)
def test_no_cluster_is_one_sentence(environment: dict[str, str], message: str, start: Start, folder: Path) -> None:
    assert re.search(message, sentence(start(Squares(folder / "ray"), **environment)))
    assert not files(folder / "ray")
