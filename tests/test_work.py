"""Atomic writes, published directories and the fingerprint that finds unfinished work again.

Mechanisms: what is unfinished has a folder of its own, which the next run removes (nothing stray); publishing renames,
or copies and renames where disks differ (killed at each of its calls here); a lock of the kernel's on a stage's work
(two processes); every file is hashed, and only a stage that knows a directory for ours asks for its manifest (hashes).
"""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import polars
import pytest
import safetensors

from pipeline import closure, files
from pipeline import work as working
from pipeline.closure import Code
from pipeline.errors import PipelineError
from pipeline.files import atomic_write, disk_errors, hash_manifest, hash_path, write_json
from pipeline.work import publish, work_directory

REPOSITORY = Path(__file__).parent.parent


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

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(PipelineError, match="No space is left"):
        write_json(tmp_path / "file.json", {})
    assert list(tmp_path.iterdir()) == []


def of_a_library(kind: str) -> None:
    """Fail as a library does whose writes meet a full disk."""
    full = "I/O error: No space left on device (os error 28)"
    if kind == "safetensors":
        raise safetensors.SafetensorError("Error while serializing: I/O error: Os { code: 28, kind: StorageFull }")
    if kind == "polars":
        raise polars.exceptions.ComputeError(full)
    if kind == "sqlite":
        raise sqlite3.OperationalError("database or disk is full")
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise RuntimeError("could not save") from error


@pytest.mark.parametrize("kind", ["safetensors", "polars", "sqlite", "wrapped"])
def test_a_full_disk_is_told_from_whatever_a_library_raises(kind: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="No space is left on the disk while writing"), disk_errors(tmp_path):
        of_a_library(kind)
    with pytest.raises(ValueError, match="another reason"), disk_errors(tmp_path):
        raise ValueError("another reason")


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


@pytest.mark.parametrize("there", ["nothing", "file", "directory", "link"])
@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("disks", [1, 2])
def test_publish_leaves_the_work_at_its_place_and_nothing_else(
    disks: int, kind: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if disks == 2:
        separate_disks(monkeypatch, tmp_path / "work")
    out, work = tmp_path / "outs/out", tmp_path / "work/x"
    work.parent.mkdir()
    out.parent.mkdir()
    kept = directory(tmp_path / "kept", a="of the user")
    if there == "file":
        out.write_text("old")
    elif there == "directory":
        directory(out, stale="old")
    elif there == "link":
        out.symlink_to(kept)
    if kind == "file":
        work.write_text("new")
    else:
        directory(directory(work, a="new") / "deep", b="new")
    publish(work, out)
    assert not out.is_symlink()
    found = {str(path.relative_to(out)) for path in out.rglob("*")} if out.is_dir() else out.read_text()
    assert found == ("new" if kind == "file" else {"a", "deep", "deep/b"})
    assert {path.name for path in tmp_path.iterdir()} == {"work", "outs", "kept"}
    assert list(out.parent.iterdir()) == [out]
    assert not list(work.parent.iterdir())
    assert (kept / "a").read_text() == "of the user"


def separate_disks(monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
    """Let nothing be renamed between ``disk`` and the rest, as between two file systems."""
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).is_relative_to(disk) != Path(target).is_relative_to(disk):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(working.os, "replace", replace)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second disk")
def test_publish_reaches_another_disk(tmp_path: Path) -> None:
    work = Path(tempfile.mkdtemp(dir="/dev/shm"))
    assert work.stat().st_dev != tmp_path.stat().st_dev
    (work / "a").write_text("new")
    publish(work, tmp_path / "models/mine")
    assert (tmp_path / "models/mine/a").read_text() == "new"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]
    assert not work.exists()


PUBLISH_AND_DIE = """
import os, signal, sys
from pathlib import Path
from pipeline import work as working
work, out, disk, last = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
calls = 0
def counted(module, name):
    function = getattr(module, name)
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "replace" and Path(arguments[0]).is_relative_to(disk) != Path(arguments[1]).is_relative_to(disk):
            raise OSError(18, "Invalid cross-device link")
        return function(*arguments, **options)
    setattr(module, name, call)
for name in ("replace", "unlink", "rmdir", "mkdir", "open"):
    counted(os, name)
counted(working.shutil, "copyfile")
working.publish(work, out)
"""


@pytest.mark.parametrize("disks", [1, 2])
def test_a_publish_killed_at_any_call_is_mended_by_the_next(disks: int, tmp_path: Path) -> None:
    finished = False
    for last in range(1, 100):
        root = tmp_path / str(last)
        work, out = directory(root / "work/x", a="new", b="new"), directory(root / "outs/out", a="old", c="old")
        disk = root / ("work" if disks == 2 else "nowhere")
        arguments = [sys.executable, "-S", "-c", PUBLISH_AND_DIE, str(work), str(out), str(disk), str(last)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path[1:]])}
        finished = subprocess.run(arguments, env=environment, check=False).returncode == 0
        if finished:
            break
        assert {path.name for path in out.parent.iterdir()} <= {"out", ".publish"}
        if not (work / "a").exists() or not (work / "b").exists():
            # Work is given up only once it is the output.
            assert {file.name for file in out.iterdir()} == {"a", "b"}
            shutil.rmtree(work, ignore_errors=True)
            directory(work, a="new", b="new")
        publish(work, out)
        assert {file.name: file.read_text() for file in out.iterdir()} == {"a": "new", "b": "new"}
        assert list(out.parent.iterdir()) == [out]
    assert finished
    assert last > 5


def test_publish_creates_the_parents(tmp_path: Path) -> None:
    publish(directory(tmp_path / "work", a="1"), tmp_path / "traces/model/ruler")
    assert (tmp_path / "traces/model/ruler/a").read_text() == "1"
    assert not (tmp_path / "work").exists()


# Few files, and one library.
CODE = Code(str(REPOSITORY / "pipeline/tables.py"))
IDENTITY = {"train": {"steps": 10, "learning_rate": 5e-5}}


def fingerprint(
    root: Path, upstream: list[Path], identity: dict[str, Any] = IDENTITY, stage: str = "train", code: Code = CODE
) -> str:
    found = work_directory(stage, identity, upstream, code, root / ".work")
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
    names = [fingerprint(tmp_path, [])]
    assert fingerprint(tmp_path, []) == names[0]
    # More files; an edit of one of them; another version of the library that it imports.
    names.append(fingerprint(tmp_path, [], code=Code(str(REPOSITORY / "pipeline/files.py"))))
    with monkeypatch.context() as edit:
        edit.setattr(closure, "hash_file", lambda path: f"edited {path.name}")
        names.append(fingerprint(tmp_path, []))
    with monkeypatch.context() as upgrade:
        upgrade.setattr(closure.metadata, "version", lambda name: "99")
        names.append(fingerprint(tmp_path, []))
    assert len(set(names)) == 4
    assert fingerprint(tmp_path, []) == names[0]


def test_a_directory_of_a_stage_is_hashed_through_its_manifest(tmp_path: Path) -> None:
    path = directory(tmp_path / "traces", **{"shard.parquet": "large", "manifest.json": json.dumps({"sha": "1"})})
    first = hash_manifest(path)
    assert first == hash_path(path / "manifest.json")
    (path / "shard.parquet").write_text("not read again")
    assert hash_manifest(path) == first
    (path / "manifest.json").write_text(json.dumps({"sha": "2"}))
    assert hash_manifest(path) != first


def test_a_directory_without_a_manifest_is_no_directory_of_a_stage(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"traces does not exist; run the stage that makes it"):
        hash_manifest(tmp_path / "traces")
    with pytest.raises(PipelineError, match=r"traces has no manifest\.json; run the stage that makes it again"):
        hash_manifest(directory(tmp_path / "traces", a="1"))


@pytest.mark.parametrize("changed", ["manifest.json", "model.safetensors", "deep/er.bin", ".hidden", "linked/file"])
def test_every_file_of_a_directory_counts(changed: str, tmp_path: Path) -> None:
    path = directory(tmp_path / "mine", **{"manifest.json": "{}", "model.safetensors": "1", ".hidden": "1"})
    directory(path / "deep", **{"er.bin": "1"})
    (path / "linked").symlink_to(directory(tmp_path / "elsewhere", file="1"))
    (path / "deep/around").symlink_to(path)  # a link back ends the walk
    first = hash_path(path)
    assert hash_path(path) == first
    (path / changed).write_text("2")
    assert hash_path(path) != first
    (path / changed).unlink()
    assert hash_path(path) != first


def test_what_a_killed_process_left_is_gone_from_the_work(tmp_path: Path) -> None:
    work = tmp_path / ".work/train" / fingerprint(tmp_path, [])
    (work / "finished").write_text("kept")
    directory(work / ".checkpoint.safetensors.123.tmp", **{".tmpAb12cD": "a library's"})
    directory(work / "train/layer=00", **{".shard-00000.tmp": "half"})
    fingerprint(tmp_path, [])
    assert {path.name for path in work.rglob("*")} == {"finished", "train", "layer=00"}


def test_what_a_library_leaves_beside_its_file_is_gone(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "weights") as temporary:
        temporary.write_text("new")
        (temporary.parent / ".tmpAb12cD").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


CLAIM = """
import sys
from pathlib import Path
from pipeline.closure import Code
from pipeline.work import work_directory
work_directory("train", {"seed": 1}, [], Code("pipeline/tables.py"), Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


def test_two_processes_never_share_a_stages_work(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLAIM, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert first.stdout is not None
    assert first.stdout.readline() == "claimed\n"
    with pytest.raises(PipelineError, match=r"Another process is at work in .*train; wait for it, or stop it"):
        work_directory("train", {"seed": 2}, [], CODE, tmp_path)
    work_directory("evaluate", {"seed": 2}, [], CODE, tmp_path)
    first.kill()  # nothing of ours runs any more: the kernel gives the lock back
    first.communicate()
    for _ in range(2):  # a process may ask again
        work_directory("train", {"seed": 2}, [], CODE, tmp_path)


def test_missing_upstream_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"traces does not exist; run the stage that makes it"):
        work_directory("train", IDENTITY, [tmp_path / "traces"], CODE, tmp_path / ".work")
    assert not (tmp_path / ".work").exists()
