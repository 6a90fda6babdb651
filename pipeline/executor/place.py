"""What a process must find where it computes: the device, threads, and the code and libraries of who sent it there."""

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import PipelineError


def check_device(device: str) -> None:
    """Refuse a device that this machine or this build of torch does not have."""
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise PipelineError(f"--device {device} cannot be used ({reason}); choose another.") from None


def threads() -> int:
    """As many threads as there are usable cores, unless the user said otherwise.

    Raises
    ------
    PipelineError
        What the user said is no number.
    """
    said = os.environ.get("OMP_NUM_THREADS")
    if said is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not said.isdecimal() or not int(said):
        raise PipelineError(f"OMP_NUM_THREADS={said}: it should be a number of threads, 1 or more.")
    return int(said)


def limit_threads() -> None:
    """Compute with :func:`threads`."""
    import torch

    torch.set_num_threads(threads())


def model_memory(weights: Path) -> int:
    """Bytes of memory to set aside for a process that runs a model: twice its files, as it is copied to the device."""
    return 2 * sum(file.stat().st_size for file in weights.glob("*.safetensors")) + 2 * 2**30


CodeState = Mapping[str, Mapping[str, str]]
"""As :func:`pipeline.closure.code_state` gives it."""


def difference(node: str, ours: CodeState, theirs: CodeState) -> str | None:
    """In a sentence, the first file or library of which a node has another version than we have; None if none."""
    for file in sorted({*ours["files"], *theirs["files"]}):
        if ours["files"].get(file) != theirs["files"].get(file):
            return (
                f"Node {node} has another {file} than this machine; let all nodes run one checkout on a disk that they "
                "share."
            )
    for name in sorted({*ours["libraries"], *theirs["libraries"]}):
        mine, other = (state["libraries"].get(name, "none") for state in (ours, theirs))
        if mine != other:
            return (
                f"Node {node} has {name} {other} and this machine {mine}, which may give other bytes; install the same "
                "on all nodes (constraints.txt), or one environment on a disk that they share."
            )
    return None
