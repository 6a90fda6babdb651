"""What ``file:`` sources are to DVC, on the real dvc.yaml: an edit runs their stages again, nothing of the user's is
deleted, changed or shared, and a temporary experiment finds them.

Mechanism: stage ``sources`` records what local files hold (sources/state), and is due at every call of DVC while there
are any. Without local files the pipeline is at rest after one run (tests/test_pipeline.py).
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.files import hash_path
from pipeline.profiles import render
from pipeline.sources import fetch as sources
from pipeline.sources import pins
from pipeline.sources.pins import OWNED, PinnedUri, content_hash, refuse_owned
from tests.conftest import MakeModel
from tests.models.test_export import save_tokenizer
from tests.test_pipeline import ENVIRONMENT, REPOSITORY, call, share_sources, stages_run

BOOLQ: dict[str, Any] = {
    "samples": {"kind": "boolq", "source": "boolq", "late_question": True, "sizes": {"test": 2}, "seed": 0},
    "evaluate": {"budgets": [24, 32], "shorter": "whole"},
    "shown": {"title": "BoolQ"},
}


def write_questions(path: Path, count: int, word: int = 5) -> None:
    passage = " ".join(f"w{word + index}" for index in range(60))
    rows = [{"question": f"w{row}", "passage": passage, "label": row % 2} for row in range(5, 5 + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_params(checkout: Path, model: str, questions: str) -> None:
    """Let the matrix be the model ``tiny`` and the benchmarks of the ci profile, with these local sources."""
    yaml = YAML()
    params = yaml.load(render("ci", checkout / "profiles").params)
    params["sources"]["tiny"] = {"uri": f"file:{model}", "licence": "mine"}
    params["sources"]["boolq"] = {"uri": f"file:{questions}", "licence": "mine"}
    params["models"]["tiny"] = {"source": "tiny", "dtype": "float32"}
    params["benchmarks"]["boolq"] = BOOLQ
    params["matrix"] |= {"model": ["tiny"], "benchmark": ["ruler", "dialogues", "boolq"]}
    with (checkout / "params.yaml").open("w") as stream:
        yaml.dump(params, stream)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> Iterator[Path]:
    """A folder with a checkout of the tracked files and, in and beside it, the user's model and questions."""
    folder = tmp_path_factory.mktemp("project")
    checkout = folder / "checkout"
    for name in call(REPOSITORY, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if (REPOSITORY / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, checkout / name)
    make_model("llama").save_pretrained(folder / "mine")
    save_tokenizer(folder / "mine")
    (checkout / "data").mkdir()
    write_questions(checkout / "data/boolq.jsonl", 6)
    set_params(checkout, str(folder / "mine"), "data/boolq.jsonl")
    call(checkout, "git", "init", "--quiet")
    call(checkout, "git", "add", "--all")
    call(checkout, "git", "commit", "--quiet", "--message", "Start")
    share_sources(checkout)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def made(project: Path) -> Path:
    """The checkout after ``dvc repro`` of the model and of the benchmark's samples."""
    checkout = project / "checkout"
    # DVC then links what a stage wrote into its cache and takes the right to write from it.
    call(checkout, "dvc", "config", "--local", "cache.type", "hardlink")
    output = call(checkout, "dvc", "repro", "samples@tiny-boolq")
    assert stages_run(output) == {"sources", "model@tiny", "samples@tiny-boolq"}
    return checkout


def repro(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["dvc", "repro", *arguments], cwd=checkout, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip


def snapshot(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    """Content, mode and number of links of every file."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mode, path.stat().st_nlink)
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_what_did_not_change_runs_nothing_but_the_record(made: Path) -> None:
    assert stages_run(call(made, "dvc", "repro", "samples@tiny-boolq")) == {"sources"}


@pytest.mark.slow
def test_the_users_files_are_not_shared_with_dvcs_cache(made: Path, project: Path) -> None:
    for path in (*(project / "mine").iterdir(), made / "data/boolq.jsonl"):
        assert path.stat().st_nlink == 1
        assert path.stat().st_mode & stat.S_IWUSR
    outs = [path for path in (made / "models/tiny").iterdir() if path.stat().st_nlink > 1]
    assert outs  # so that the above could have failed


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


EDITS: dict[str, tuple[Callable[[Path], Any], str, set[str]]] = {
    "questions edited": (
        lambda p: write_questions(p / "checkout/data/boolq.jsonl", 8, 7),
        "samples@tiny-boolq",
        {"sources", "samples@tiny-boolq"},
    ),
    "model edited": (lambda p: flip(p / "mine/model.safetensors"), "model@tiny", {"sources", "model@tiny"}),
    "model without a file": (
        lambda p: (p / "mine/generation_config.json").unlink(),
        "model@tiny",
        {"sources", "model@tiny"},
    ),
    "model with a new file": (
        lambda p: (p / "mine/chat_template.jinja").write_text("{{ messages[0].content }}"),
        "model@tiny",
        {"sources", "model@tiny"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_runs_the_stages_of_what_was_edited(edit: str, made: Path, project: Path) -> None:
    change, target, expected = EDITS[edit]
    change(project)
    assert stages_run(call(made, "dvc", "repro", target)) == expected
    assert stages_run(call(made, "dvc", "repro", target)) == {"sources"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["commit --force sources", "checkout sources", "push sources", "status"])
def test_no_other_command_of_dvc_ends_the_watch(command: str, made: Path, project: Path) -> None:
    if command.startswith("push"):
        call(made, "dvc", "remote", "add", "--local", "--default", "--force", "storage", str(project / "storage"))
    call(made, "dvc", *command.split())
    assert (made / "sources/watch/every-time").is_symlink()
    assert stages_run(call(made, "dvc", "repro", "sources")) == {"sources"}


@pytest.mark.slow
def test_the_watch_ends_with_the_last_local_source(made: Path) -> None:
    kept = (made / "params.yaml").read_text()
    (made / "params.yaml").write_text(render("ci", made / "profiles").params)
    assert stages_run(call(made, "dvc", "repro", "sources")) == {"sources"}
    assert "up to date" in call(made, "dvc", "status", "sources")
    assert call(made, "git", "status", "--short", "sources") == ""
    for _ in range(2):
        assert stages_run(call(made, "dvc", "repro", "sources")) == set()
    (made / "params.yaml").write_text(kept)
    for _ in range(2):
        assert stages_run(call(made, "dvc", "repro", "sources")) == {"sources"}


@pytest.mark.slow
def test_a_removed_source_is_named_by_its_own_stage_and_found_when_it_is_back(made: Path, project: Path) -> None:
    (made / "data/boolq.jsonl").rename(project / "elsewhere")
    done = repro(made, "samples@tiny-boolq")
    assert done.returncode != 0
    assert stages_run(done.stdout) == {"sources", "samples@tiny-boolq"}
    assert "error: file:data/boolq.jsonl does not exist; correct the path" in done.stdout
    assert stages_run(call(made, "dvc", "repro", "model@tiny")) == {"sources"}  # of which nothing is missing
    (project / "elsewhere").rename(made / "data/boolq.jsonl")
    call(made, "dvc", "repro", "samples@tiny-boolq")
    assert (made / "samples/tiny/boolq/test.parquet").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--temp",), ("--queue",)])
def test_a_temporary_experiment_finds_local_files_and_downloads_nothing(how: tuple[str, ...], made: Path) -> None:
    call(made, "git", "add", "--all")
    call(made, "git", "commit", "--quiet", "--allow-empty", "--message", "Local sources")
    seed = {"--temp": 1, "--queue": 2}[how[0]]
    experiment = [
        "dvc",
        "exp",
        "run",
        *how,
        *(f"-Sbenchmarks.{name}.samples.seed={seed}" for name in ("boolq", "dialogues")),
    ]
    environment = ENVIRONMENT | {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0"}
    targets = ["samples@tiny-boolq"]
    if how == ("--temp",):
        commands = [[*experiment, *targets]]
    else:
        commands = [[*experiment, *targets], ["dvc", "exp", "run", "--run-all"]]
    output = ""
    for command in commands:
        done = subprocess.run(
            command, cwd=made, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        output += done.stdout
        assert done.returncode == 0, output
    assert "does not exist" not in output
    assert "Ran experiment" in output
    assert not list((made / ".dvc/tmp/exps").rglob("*.whl"))


PLACES = {
    "an output itself": "models/tiny",
    "another stage's": "{checkout}/samples/x/mine",
    "through a link": "{folder}/link-to-models/mine",
    "around outputs": ".",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
def test_a_source_where_stages_write_is_refused_before_anything_is_touched(
    where: str, made: Path, project: Path, tmp_path: Path
) -> None:
    """``dvc repro --single-item model@NAME`` skips the stage that refuses, and DVC deletes the output first."""
    for name in ("models/mine", "samples/x/mine"):
        shutil.copytree(project / "mine", made / name, dirs_exist_ok=True)
    if not (project / "link-to-models").is_symlink():
        (project / "link-to-models").symlink_to(made / "models")
    uri = PLACES[where].format(checkout=made, folder=project)
    kept = (made / "params.yaml").read_text()
    set_params(made, uri, "data/boolq.jsonl")
    before = {name: snapshot(made / name) for name in ("models", "samples")} | {"mine": snapshot(project / "mine")}
    try:
        done = repro(made, "model@tiny")
        assert done.returncode != 0
        assert stages_run(done.stdout) == {"sources"}
        assert f"error: file:{uri} lies in or around" in done.stdout
        assert before == {name: snapshot(made / name) for name in ("models", "samples")} | {
            "mine": snapshot(project / "mine")
        }
    finally:
        (made / "params.yaml").write_text(kept)
        for name in ("models/mine", "samples/x"):
            shutil.rmtree(made / name)


# -- the same, without DVC


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def test_every_output_of_dvc_yaml_is_owned() -> None:
    tops = {".work", ".dvc", ".publish", "studies"}
    for stage in YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"].values():
        for kind in ("outs", "metrics", "plots"):
            names = [out if isinstance(out, str) else next(iter(out)) for out in stage.get(kind, [])]
            tops |= {name.split("/")[0] for name in names}
    assert len(tops) > 12
    assert tops <= set(OWNED)


@pytest.mark.parametrize("name", OWNED)
def test_every_owned_directory_is_refused_however_it_is_written(name: str, checkout: Path, tmp_path: Path) -> None:
    inside = [name, f"{name}/x", f"./{name}/x/../y", f"{checkout}/{name}/x", f"data/../{name}"]
    for path in inside:  # also where nothing is there yet
        with pytest.raises(PipelineError, match=rf"file:{path} lies in or around {name}/"):
            refuse_owned(PinnedUri(uri=f"file:{path}"))
    (checkout / name).mkdir()
    (checkout / "link").symlink_to(name)
    for path in ("link", "link/x", ".", f"{tmp_path}", ".."):
        with pytest.raises(PipelineError, match=f"file:{path} lies in or around"):
            refuse_owned(PinnedUri(uri=f"file:{path}"))
    for path in ("data", f"my-{name}", f"data/{name}", f"{name}2/x"):
        refuse_owned(PinnedUri(uri=f"file:{path}"))


def test_an_owned_directory_that_is_a_link_is_refused_by_its_real_name(checkout: Path) -> None:
    (checkout / "big").mkdir()
    (checkout / "traces").symlink_to("big")
    with pytest.raises(PipelineError, match=r"file:big/mine lies in or around traces/"):
        refuse_owned(PinnedUri(uri="file:big/mine"))


def test_a_temporary_experiment_reads_the_users_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "data").mkdir()
    (checkout / "data/x").write_text("1")
    (checkout / "models").mkdir()
    (checkout / "temporary").mkdir()
    monkeypatch.chdir(checkout / "temporary")
    monkeypatch.setenv("DVC_ROOT", str(checkout))
    assert sources.fetch(PinnedUri(uri="file:data/x")).read_text() == "1"
    # The stages write in the temporary workspace, and later experiments in the checkout.
    for path in ("models/x", f"{checkout}/temporary/models/x"):
        with pytest.raises(PipelineError, match="lies in or around models/"):
            refuse_owned(PinnedUri(uri=f"file:{path}"))


def test_a_large_file_is_read_once_while_it_stays_as_it_is(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkout / "data"
    directory.mkdir()
    (directory / "large").write_bytes(os.urandom(2 << 20))
    (directory / "small").write_bytes(b"1")
    read: list[str] = []
    original = pins.hash_file
    monkeypatch.setattr(pins, "hash_file", lambda path: read.append(path.name) or original(path))
    first = content_hash(directory)
    assert first == hash_path(directory) == content_hash(directory)
    assert read.count("large") == 1
    flip(directory / "large")
    assert content_hash(directory) == hash_path(directory) != first
    (directory / "small").write_bytes(b"2")
    second = content_hash(directory)
    assert second == hash_path(directory)
    # Replaced by another file of the same size and time.
    time = (directory / "large").stat().st_mtime_ns
    (directory / "new").write_bytes(os.urandom(2 << 20))
    os.utime(directory / "new", ns=(time, time))
    os.replace(directory / "new", directory / "large")
    assert content_hash(directory) == hash_path(directory) != second
    (checkout / ".work/hashes.json").write_text("damaged")
    assert content_hash(directory) == hash_path(directory)


def test_the_pip_that_is_not_there_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PipelineError, match=r"has no pip to download x==1; make it with `uv venv --seed`.*ensurepip"):
        sources.fetch(PinnedUri(uri="wheel:x==1", sha256="0" * 64))
