"""Interruptible outputs: work under .work/<stage>/<fingerprint>/, publish by renaming.

DVC deletes a stage's outs before it runs, so unfinished work lives elsewhere. The fingerprint holds
everything the bytes depend on: parameters, upstream outputs and the source of this package. An
interrupted stage finds its finished pieces again only when all of that is unchanged. Device, worker
and thread counts stay outside: they are run-time arguments, not identity.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

PACKAGE = Path(__file__).parent


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    # file_digest reads into one small buffer, which stays in the processor's cache.
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_path(path: Path) -> str:
    """sha256 over a file, or over a directory's relative names and contents.

    A directory with a ``manifest.json`` is hashed through it: the manifest carries the checksums of
    the other files, and traces at paper scale are too large to read twice.
    """
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise PipelineError(f"{path} does not exist; run the stage that makes it (dvc repro does).")
    if (path / "manifest.json").is_file():
        return hash_file(path / "manifest.json")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{file.relative_to(path)}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


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
    return directory


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success rename it, on failure leave nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys sorted so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def publish(work: Path, out: Path) -> None:
    """Move a finished work directory onto a stage's output, replacing what is there."""
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            # os.replace cannot replace a directory that is not empty.
            retired = out.with_name(f".{out.name}.{os.getpid()}.retired")
            os.replace(out, retired)
            os.replace(work, out)
            shutil.rmtree(retired)
        else:
            os.replace(work, out)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PipelineError(
                f"No space is left on the disk while writing {path}; free some and run again, finished pieces are kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise PipelineError(f"{path} cannot be written: {error.strerror}; check the permissions.") from error
        raise
