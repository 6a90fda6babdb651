"""Interruptible outputs: work under .work/<stage>/<fingerprint>/, publish by renaming.

DVC deletes a stage's outs before it runs, so unfinished work lives elsewhere. The fingerprint holds
everything the bytes depend on: parameters, upstream outputs and the source of this package. An
interrupted stage finds its finished pieces again only when all of that is unchanged. Device, worker
and thread counts stay outside: they are run-time arguments, not identity.

Whatever is not finished lies in a folder of its own (``.<name>.<process>.tmp`` in .work, ``.publish`` beside an
output), also what a library leaves beside the file that it was told to write. So a process that is killed at any
moment leaves nothing in an output, and the next run of its stage removes what it left.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import PipelineError

PACKAGE = Path(__file__).parent
MANIFEST = "manifest.json"
STAGING = ".publish"

# What the system calls it, what Rust calls it, and SQLite.
_FULL = re.compile(r"No space left on device|StorageFull|QuotaExceeded|Disk quota exceeded|database or disk is full")
# Held until the process ends, however it ends: the kernel releases them.
_locks: dict[Path, FileLock] = {}


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    # file_digest reads into one small buffer, which stays in the processor's cache.
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def repository_root() -> Path:
    """The user's own checkout: DVC_ROOT, which a temporary or queued experiment sets too, or the current folder."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def hash_path(path: Path, hash_file: Callable[[Path], str] = hash_file) -> str:
    """sha256 over a file, or over a directory's relative names and contents, symbolic links followed."""
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise PipelineError(f"{path} does not exist; run the stage that makes it (dvc repro does).")
    digest = hashlib.sha256()
    for file in sorted(files_below(path)):
        digest.update(f"{file.relative_to(path)}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def files_below(directory: Path, around: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every file in a directory at any depth; in linked directories too, but no compiled Python code.

    ``around`` are the real paths of the directories that were entered: a link may lead back to one of them.
    """
    real = os.path.realpath(directory)
    if real in around:
        return
    for path in directory.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir() and path.name != "__pycache__":
            yield from files_below(path, (*around, real))


def hash_manifest(directory: Path) -> str:
    """sha256 of the manifest of a directory that a stage of this project wrote.

    A manifest carries the checksums of all other files, which their reader compares; traces at paper scale are too
    large to read twice. Of any other directory, a ``manifest.json`` says nothing: :func:`hash_path` reads it all.
    """
    if not directory.is_dir():
        raise PipelineError(f"{directory} does not exist; run the stage that makes it (dvc repro does).")
    if not (directory / MANIFEST).is_file():
        raise PipelineError(f"{directory} has no {MANIFEST}; run the stage that makes it again.")
    return hash_file(directory / MANIFEST)


def source_hash() -> str:
    """sha256 over the package's own source files."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE)}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def work_directory(stage: str, identity: dict[str, Any], upstream: list[Path], root: Path = Path(".work")) -> Path:
    """The directory in which ``stage`` may leave unfinished work for these inputs; created if absent.

    Parameters
    ----------
    stage
        Name of the stage and its matrix entry, for humans who look into .work.
    identity
        JSON-serialisable parameters the output depends on.
    upstream
        Files and directories the output is computed from.
    """
    parts = {
        "identity": identity,
        "upstream": {str(path): hash_path(path) for path in upstream},
        "source": source_hash(),
    }
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    directory = root / stage / fingerprint
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _claim(root / stage)
        for leftover in directory.rglob(".*.tmp"):
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


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a name to write to; on success rename it to ``path``, on failure leave nothing.

    It lies in a folder of its own beside ``path``: libraries put files of theirs next to what they write.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            yield folder / path.name
            os.replace(folder / path.name, path)
    finally:
        remove(folder)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys sorted so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence about ``path``."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise PipelineError(
                f"No space is left on the disk while writing {path}; free some and run again, finished pieces are kept."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
            raise PipelineError(f"{path} cannot be written: {error.strerror}; check the permissions.") from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, tells of a full disk.

    Libraries written in Rust and C++ raise types of their own (safetensors, polars, arrow, SQLite), so that only
    their words say so.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if not isinstance(error, PipelineError) and _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
