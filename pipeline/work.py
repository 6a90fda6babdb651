"""Interruptible outputs: work under .work/<stage>/<fingerprint>/, publish by renaming. It knows no stage from inside.

DVC deletes a stage's outs before it runs, so unfinished work lives elsewhere. The fingerprint holds everything the
bytes depend on: the parameters, the outputs of earlier stages, the files that the stage imports and the versions of
the libraries that these import (``pipeline/closure.py``). An interrupted stage finds its finished pieces again only
when all of that is unchanged. Device, worker and thread counts stay outside: they are run-time arguments, not identity.

Whatever is not finished lies in a folder of its own (``.<name>.<drawn>.tmp`` in .work, ``.publish`` beside an
output), also what a library leaves beside the file that it was told to write. So a process that is killed at any
moment leaves nothing in an output, and the next run of its stage removes what it left.
"""

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.closure import Code, code_state
from pipeline.errors import PipelineError
from pipeline.files import STAGING, disk_errors, hash_path, remove

# Held until the process ends, however it ends: the kernel releases them.
_locks: dict[Path, FileLock] = {}


def work_directory(
    stage: str, identity: dict[str, Any], upstream: list[Path], code: Code, root: Path = Path(".work")
) -> Path:
    """The directory in which ``stage`` may leave unfinished work for these inputs; created if absent.

    Parameters
    ----------
    stage
        Name of the stage and its matrix entry, for humans who look into .work.
    identity
        Parameters the output depends on: sections, and what JSON can hold.
    upstream
        Files and directories the output is computed from.
    code
        What computes it: the stage's own file, and the entries of registries that it uses.
    """
    parts = {
        "identity": identity,
        "upstream": {str(path): hash_path(path) for path in upstream},
        "code": code_state(code),
    }
    told = json.dumps(parts, sort_keys=True, default=lambda section: section.model_dump(mode="json"))
    fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
    directory = root / stage / fingerprint
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _claim(root / stage)
        for leftover in list(directory.rglob(".*.tmp")):
            remove(leftover)
    return directory


def _claim(directory: Path) -> None:
    """Keep other processes out of a stage's work until this one ends; they would write the same files."""
    key = directory.resolve()
    if key in _locks:
        return
    lock = FileLock(directory / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PipelineError(
            f"Another process is at work in {directory}; wait for it, or stop it and run again."
        ) from None
    _locks[key] = lock


def publish(work: Path, out: Path) -> None:
    """Move finished work, a file or a directory, onto a stage's output, replacing what is there.

    Where ``work`` lies on another disk than ``out`` it is copied, and renamed once the copy is whole. A process that
    is killed leaves at most a folder ``.publish`` beside ``out``, which git and DVC ignore and the next call removes.
    """
    staging = out.parent / STAGING
    new, old = staging / f"{out.name}.new", staging / f"{out.name}.old"
    with disk_errors(out):
        try:
            staging.mkdir(parents=True, exist_ok=True)
            remove(new)
            remove(old)
            _replace(work, out, new, old)
        finally:
            remove(new)
            remove(old)
            with suppress(OSError):  # another output of this folder may be on its way
                staging.rmdir()
        remove(work)


def _replace(work: Path, out: Path, new: Path, old: Path) -> None:
    whole = work
    try:
        os.replace(work, out)
        return
    except OSError as error:
        if error.errno == errno.EXDEV:
            whole = new
        elif not os.path.lexists(out):
            raise
    if whole == new:
        (shutil.copytree if work.is_dir() else shutil.copyfile)(work, new)
    if os.path.lexists(out):
        # A directory that is not empty cannot be replaced.
        os.replace(out, old)
    os.replace(whole, out)
