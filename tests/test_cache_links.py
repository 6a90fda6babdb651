"""DVC's cache shares its blocks with the outputs, and a stage that runs again leaves what is cached as it was.

Mechanism: ``cache.type`` in .dvc/config, and that ``publish`` writes into no file that is there.
"""

import shutil
from hashlib import md5
from pathlib import Path

import pytest

from tests.test_pipeline import REPOSITORY, call

STAGE = """
import sys
from pathlib import Path
from pipeline.work import publish
work = Path("work")
(work / "deep").mkdir(parents=True)
(work / "deep/large").write_bytes(Path("input").read_bytes() * 1000)
(work / "small").write_bytes(Path("input").read_bytes())
publish(work, Path("out"))
Path("made").write_bytes(Path("input").read_bytes())
publish(Path("made"), Path("file"))
"""
PIPELINE = "stages: {one: {cmd: python stage.py, deps: [input], outs: [out, file]}}\n"


def cached(project: Path) -> dict[Path, bytes]:
    files = (path for path in (project / ".dvc/cache/files/md5").rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("config", [".dvc/config", "studies/.dvc/config"])
def test_outputs_are_no_second_copy_and_a_rerun_changes_no_cached_file(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    call(tmp_path, "dvc", "init", "--quiet", "--no-scm")
    shutil.copy(REPOSITORY / config, tmp_path / ".dvc/config")
    call(tmp_path, "dvc", "config", "--local", "core.no_scm", "true")
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    seen: dict[Path, bytes] = {}
    for content in ("first", "second"):
        (tmp_path / "input").write_text(content)
        call(tmp_path, "dvc", "repro")
        for name in ("out/deep/large", "out/small", "file"):
            output = tmp_path / name
            assert output.read_text() == content * (1000 if name.endswith("large") else 1)
            # One file under both names, which nobody may write into.
            assert output.stat().st_nlink > 1
            assert not output.stat().st_mode & 0o222
        now = cached(tmp_path)
        assert seen.items() <= now.items()
        seen = now
        for path, stored in now.items():
            assert md5(stored, usedforsecurity=False).hexdigest() == (path.parent.name + path.name).removesuffix(".dir")
    # What an earlier run made is there again without a copy or a run.
    (tmp_path / "input").write_text("first")
    call(tmp_path, "dvc", "repro")
    assert (tmp_path / "out/deep/large").read_text() == "first" * 1000


def test_an_interrupted_push_goes_on_with_the_files_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, remote = tmp_path / "project", tmp_path / "remote"
    project.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    call(project, "dvc", "init", "--quiet", "--no-scm")
    call(project, "dvc", "remote", "add", "--default", "storage", str(remote))
    (project / "traces").mkdir()
    for layer in range(6):
        (project / f"traces/layer={layer:02d}").write_text(str(layer) * 1000)
    call(project, "dvc", "add", "traces")
    call(project, "dvc", "push")
    there = {path: path.stat().st_mtime_ns for path in remote.rglob("*") if path.is_file()}
    assert len(there) == 7  # and the list of the directory, which is sent last
    listed = next(path for path in there if path.suffix == ".dir")
    lost = [path for path in there if path != listed][:2]
    for path in (listed, *lost):
        path.unlink()
    assert "3 files pushed" in call(project, "dvc", "push")
    for path, time in there.items():
        assert path.is_file()
        assert path in (listed, *lost) or path.stat().st_mtime_ns == time
