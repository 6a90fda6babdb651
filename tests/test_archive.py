"""The files without their repository: an archive of a release, or a copy that lost its .git."""

import subprocess
from pathlib import Path

import pytest

from tests.test_pipeline import ENVIRONMENT, REPOSITORY, call, stages_run


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    # Of the working tree, as far as git knows it: what is committed may be older than this test.
    tree = call(REPOSITORY, "git", "stash", "create").strip() or "HEAD"
    packed = subprocess.run(["git", "archive", tree], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "x", "-C", str(tmp_path)], input=packed, check=True)
    assert not (tmp_path / ".git").exists()
    return tmp_path


def test_dvc_works_in_an_archive_as_it_is(archive: Path) -> None:
    assert stages_run(call(archive, "dvc", "repro", "--dry", "sources")) == {"sources"}
    assert stages_run(call(archive, "dvc", "repro", "sources")) == {"sources"}
    assert stages_run(call(archive, "dvc", "repro", "sources")) == set()


def test_make_tells_dvc_where_the_repository_is_lost(archive: Path) -> None:
    config = archive / ".dvc/config"
    config.write_text((REPOSITORY / ".dvc/config").read_text())  # as in a clone
    done = subprocess.run(
        ["dvc", "repro", "--dry", "sources"], cwd=archive, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert "is not a git repository" in done.stderr
    (recipe,) = [line.strip() for line in (archive / "Makefile").read_text().splitlines() if "core.no_scm" in line]
    call(archive, "sh", "-c", recipe)
    assert stages_run(call(archive, "dvc", "repro", "--dry", "sources")) == {"sources"}


def test_a_clone_keeps_what_needs_git(archive: Path) -> None:
    assert "no_scm" in (archive / ".dvc/config").read_text()
    assert call(REPOSITORY, "dvc", "config", "--list").count("no_scm") == 0
