"""A copy of the project with a profile of its own, smaller, whose hub is on this computer."""

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.profiles import render
from pipeline.section import parse_text
from tests.rehearsal import data_sets, hub, models
from tests.test_pipeline import ENVIRONMENT, REPOSITORY, call, copy_tracked

Section = dict[str, Any]
# Of the text, what a tokenizer is learned from.
_LEARNED = 400_000


def hub_repositories(params: Section) -> dict[str, tuple[str, str]]:
    """Entry of ``sources`` that the matrix needs from the hub -> repository and revision."""
    named = {params["models"][name]["source"] for name in params["matrix"]["model"]}
    named |= {params["benchmarks"][name]["samples"]["source"] for name in params["matrix"]["benchmark"]}
    found = {name: params["sources"][name] for name in params["sources"] if name in named}
    return {
        name: ("/".join(source["uri"].removeprefix("hub:").split("/")[:2]), source["revision"])
        for name, source in found.items()
        if source["uri"].startswith("hub:")
    }


def profile_params(name: str) -> Section:
    """params.yaml of a profile, as the project writes it."""
    return parse_text(render(name, REPOSITORY / "profiles").params)


def fill_hub(params: Section, root: Path, essays: Path) -> None:
    """Write everything that a profile fetches from the hub, under the repositories and revisions that it names."""
    text = json.loads(essays.read_text())["text"]
    for repository, revision in hub_repositories(params).values():
        if repository in models.HUB:
            folder = hub.place(root, hub.MODELS, repository, revision)
            if not folder.is_dir():
                models.write_model(repository, text[:_LEARNED], folder)
        elif repository in data_sets.HUB:
            folder = hub.place(root, hub.DATASETS, repository, revision)
            if not folder.is_dir():
                data_sets.HUB[repository](folder, data_sets.Words(text))
        else:
            raise AssertionError(
                f"no rehearsal knows {repository}; add it to HUB of tests/rehearsal/models.py or data_sets.py"
            )


def make_project(directory: Path, params: Section) -> None:
    """The tracked files and ``params`` in a checkout of its own, with the wheels that this one has fetched."""
    copy_tracked(directory)
    write_params(directory, params)
    call(directory, "git", "init", "--quiet")
    call(directory, "git", "add", "--all")
    call(directory, "git", "commit", "--quiet", "--message", "Start")
    # Not the cache as a whole: what comes from this hub must not be taken for the real models.
    cache = directory / ".cache/sources"
    cache.mkdir(parents=True)
    for part in ("wheels", "unpacked"):
        (cache / part).symlink_to(REPOSITORY / ".cache/sources" / part)


def write_params(directory: Path, params: Section) -> None:
    with (directory / "params.yaml").open("w") as stream:
        YAML(typ="safe").dump(_plain(params), stream)


def environment(endpoint: str) -> dict[str, str]:
    """That of the other end-to-end tests, with the hub at another address."""
    return ENVIRONMENT | {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _plain(value) for name, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, tuple) else node
