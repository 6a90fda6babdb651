"""Atomic writes, published directories and the fingerprint that finds unfinished work again."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import workdir
from pipeline.errors import PipelineError
from pipeline.workdir import atomic_write, disk_errors, hash_path, publish, work_directory, write_json


def test_atomic_write_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep/file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_what_was_there(failure: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, r"No space is left on the disk while writing .*file\.txt; free some"),
        (errno.EDQUOT, r"No space is left on the disk while writing .*file\.txt; free some"),
        (errno.EROFS, r"file\.txt cannot be written: Read-only file system; check the permissions"),
        (errno.EACCES, r"file\.txt cannot be written: Permission denied; check the permissions"),
    ],
)
def test_a_disk_that_refuses_is_a_sentence(number: int, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(PipelineError, match=sentence):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_the_rename_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workdir.os, "replace", full)
    with pytest.raises(PipelineError, match="No space is left"):
        write_json(tmp_path / "file.json", {})
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), disk_errors(tmp_path):
        tmp_path.read_text()


def test_equal_values_give_equal_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [2.5, None]})
    write_json(tmp_path / "b.json", {"a": [2.5, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def directory(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_publish_replaces_an_existing_directory(tmp_path: Path) -> None:
    out = directory(tmp_path / "out", stale="old", both="old")
    publish(directory(tmp_path / "work", both="new"), out)
    assert {file.name: file.read_text() for file in out.iterdir()} == {"both": "new"}
    assert list(tmp_path.iterdir()) == [out]


def test_publish_creates_the_parents(tmp_path: Path) -> None:
    publish(directory(tmp_path / "work", a="1"), tmp_path / "traces/model/corpus")
    assert (tmp_path / "traces/model/corpus/a").read_text() == "1"
    assert not (tmp_path / "work").exists()


IDENTITY = {"train": {"steps": 10, "learning_rate": 5e-5}}


def fingerprint(root: Path, upstream: list[Path], identity: dict[str, Any] = IDENTITY, stage: str = "train") -> str:
    found = work_directory(stage, identity, upstream, root / ".work")
    assert found.is_dir()
    assert found.parent == root / ".work" / stage
    return found.name


def test_the_fingerprint_is_stable(tmp_path: Path) -> None:
    upstream = [directory(tmp_path / "traces", a="1", b="2")]
    first = fingerprint(tmp_path, upstream)
    reordered = {"train": {"learning_rate": 5e-5, "steps": 10}}
    os.utime(upstream[0] / "a", (0, 0))
    directory(upstream[0] / "__pycache__", x="compiled")
    assert fingerprint(tmp_path, upstream, reordered) == first


def test_the_fingerprint_changes_with_the_parameters(tmp_path: Path) -> None:
    upstream = [directory(tmp_path / "traces", a="1")]
    names = {
        fingerprint(tmp_path, upstream, {"train": {"steps": steps, "learning_rate": rate}})
        for steps, rate in ((10, 5e-5), (11, 5e-5), (10, 6e-5))
    }
    assert len(names) == 3


def test_the_fingerprint_changes_with_what_is_upstream(tmp_path: Path) -> None:
    upstream = directory(tmp_path / "traces", a="1", b="2")
    names = [fingerprint(tmp_path, [upstream])]
    (upstream / "a").write_text("3")
    names.append(fingerprint(tmp_path, [upstream]))
    (upstream / "a").rename(upstream / "c")
    names.append(fingerprint(tmp_path, [upstream]))
    (upstream / "d").write_text("")
    names.append(fingerprint(tmp_path, [upstream]))
    assert len(set(names)) == 4


def test_the_fingerprint_changes_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = directory(tmp_path / "package", **{"code.py": "x = 1"})
    monkeypatch.setattr(workdir, "PACKAGE", package)
    names = [fingerprint(tmp_path, [])]
    (package / "code.py").write_text("x = 2")
    names.append(fingerprint(tmp_path, []))
    (package / "code.py").rename(package / "other.py")
    names.append(fingerprint(tmp_path, []))
    assert len(set(names)) == 3
    (package / "notes.txt").write_text("no source")
    assert fingerprint(tmp_path, []) == names[-1]


def test_a_directory_with_a_manifest_is_hashed_through_it(tmp_path: Path) -> None:
    path = directory(tmp_path / "traces", **{"shard.parquet": "large", "manifest.json": json.dumps({"sha": "1"})})
    first = hash_path(path)
    assert first == hash_path(path / "manifest.json")
    (path / "shard.parquet").write_text("not read again")
    assert hash_path(path) == first
    (path / "manifest.json").write_text(json.dumps({"sha": "2"}))
    assert hash_path(path) != first


def test_missing_upstream_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"traces does not exist; run the stage that makes it"):
        work_directory("train", IDENTITY, [tmp_path / "traces"], tmp_path / ".work")
    assert not (tmp_path / ".work").exists()
