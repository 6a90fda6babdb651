"""Files: hashed, written whole or not at all, removed, and a full disk told in a sentence. It knows no stage."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

MANIFEST = "manifest.json"
# Where outputs stand that are on their way (``pipeline/work.py``).
STAGING = ".publish"

# What the system calls it, what Rust calls it, and SQLite.
_FULL = re.compile(r"No space left on device|StorageFull|QuotaExceeded|Disk quota exceeded|database or disk is full")


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    # file_digest reads into one small buffer, which stays in the processor's cache.
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def repository_root() -> Path:
    """The user's own checkout: DVC_ROOT, which a temporary or queued experiment sets too, or the current folder."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def temporary_name(path: Path) -> Path:
    """A new name beside ``path`` for what is on its way there; ``pipeline/work.py`` removes what is left of it.

    Drawn, as processes of two machines that share a disk may have the same number.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a name to write to; on success rename it to ``path``, on failure leave nothing.

    It lies in a folder of its own beside ``path``: libraries put files of theirs next to what they write.
    """
    folder = temporary_name(path)
    try:
        with disk_errors(path):
            folder.mkdir(parents=True)
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
