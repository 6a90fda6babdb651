"""Every profile renders to valid files, params.yaml is one of them, and writing one takes no work away."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.params import check_params, load_params
from pipeline.profiles import changes, differences, is_hand_made, known_profiles, render
from pipeline.section import parse, parse_text
from tests.commands import in_this_process

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "profiles"
PROFILES = known_profiles(FOLDER)


def test_the_profiles_that_others_rely_on_exist() -> None:
    assert {"default", "ci"} <= set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_validates_and_carries_its_name(name: str) -> None:
    rendered = render(name, FOLDER)
    assert check_params(parse_text(rendered.params)).profile == name
    assert set(parse_text(rendered.studies)) == {"latency", "sensitivity"}
    assert all(len(line) <= 130 and line == line.rstrip() for line in rendered.params.splitlines())
    # What is written is what was meant: written again, it is the same.
    assert YAML(typ="safe").load(rendered.params) == YAML(typ="safe", pure=True).load(rendered.params)


def test_params_yaml_is_the_profile_it_names() -> None:
    path = REPOSITORY / "params.yaml"
    rendered = render(load_params(path).profile, FOLDER)
    assert path.read_text() == rendered.params
    assert (REPOSITORY / "studies/params.yaml").read_text() == rendered.studies
    assert not is_hand_made(path, FOLDER)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_the_default_and_what_it_changes(name: str) -> None:
    def merged(base: Any, overlay: Any) -> Any:
        if isinstance(base, dict) and isinstance(overlay, dict) and overlay:
            return base | {key: merged(base.get(key), value) for key, value in overlay.items()}
        return overlay

    def whole(profile: str) -> dict[str, Any]:
        content: dict[str, Any] = YAML(typ="safe").load((FOLDER / f"{profile}.yaml").read_text())
        if profile == "default":
            return content
        return dict(merged(whole(content.pop("extends", "default")), content))

    expected = whole(name) | {"profile": name}
    rendered = render(name, FOLDER)
    load = YAML(typ="safe").load
    assert load(rendered.studies) == expected.pop("studies")
    assert load(rendered.params) == expected


@pytest.mark.parametrize("name", PROFILES)
def test_comments_are_kept(name: str) -> None:
    text = render(name, FOLDER).params
    for comment in (
        "# press: a class of kvpress that scores tokens, with its options; own: a file of pipeline/eviction/baselines.",
        "# samples: of the file pipeline/benchmarks/KIND.py; sizes are per task where there are tasks.",
        "# files of pipeline/policy/inputs",
    ):
        assert comment in text


@pytest.mark.usefixtures("dvc_parses_once")
@pytest.mark.parametrize("name", PROFILES)
def test_dvc_finds_every_key_that_its_stages_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    for file in ("dvc.yaml", "studies/dvc.yaml"):
        shutil.copy(REPOSITORY / file, tmp_path / file)
    rendered = render(name, FOLDER)
    (tmp_path / "params.yaml").write_text(rendered.params)
    (tmp_path / "studies/params.yaml").write_text(rendered.studies)
    params = load_params(tmp_path / "params.yaml")
    repo = Repo.init(str(tmp_path), no_scm=True)
    keys = []
    for stage in repo.index.stages:
        for dependency in stage.deps:
            # Of params.yaml: other files are made by stages.
            if isinstance(dependency, ParamsDependency) and dependency.fs_path == str(tmp_path / "params.yaml"):
                assert set(dependency.read_params()) == set(dependency.params), stage
                keys += dependency.params
    repo.close()
    assert {f"models.{name}.dtype" for name in params.matrix.model} <= set(keys)
    assert {f"benchmarks.{name}.samples" for name in params.matrix.benchmark} <= set(keys)


def folder(directory: Path, **overlays: str) -> Path:
    """A small default and profiles that change it."""
    default = (
        "# First.\nprofile: default\na: {b: 1, c: [1, 2]} # of a\nd:\n  # Above e.\n  e: 1.0e-3\nstudies: {s: 1}\n"
    )
    for name, text in {"default": default, **overlays}.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory


def test_mappings_merge_and_everything_else_replaces(tmp_path: Path) -> None:
    made = folder(tmp_path, one="a: {b: 2}\nd: {f: null}\n", two="extends: one\na: {c: []}\nd: {}\nstudies: {s: 2}\n")
    assert parse_text(render("one", made).params) == {
        "profile": "one",
        "a": {"b": 2, "c": (1, 2)},
        "d": {"e": 1e-3, "f": None},
    }
    two = render("two", made)
    assert parse_text(two.params) == {"profile": "two", "a": {"b": 2, "c": ()}, "d": {}}
    assert parse_text(two.studies) == {"s": 2}
    assert "# of a" in two.params
    assert "# First." in two.params
    assert "f: null" in render("one", made).params


@pytest.mark.parametrize(
    ("overlays", "name", "message"),
    [
        ({}, "three", "There is no profile three; there are default"),
        ({"one": "extends: three\n"}, "one", "There is no profile three; there are default, one"),
        ({"one": "extends: one\n"}, "one", "one.yaml extends itself, by way of one; correct it"),
        ({"one": "extends: two\n", "two": "extends: one\n"}, "one", "one.yaml extends itself, by way of one and two"),
        ({"one": "a: [1\n"}, "one", "one.yaml cannot be read"),
        ({"one": "- a\n"}, "one", "one.yaml is no mapping of sections; restore it"),
    ],
)
def test_profiles_that_cannot_be_rendered_are_one_sentence(
    overlays: dict[str, str], name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        render(name, folder(tmp_path, **overlays))
    assert "\n" not in str(caught.value)


def test_every_change_is_named(tmp_path: Path) -> None:
    before = {"a": {"b": 1, "c": (1, 2)}, "d": "x", "gone": None}
    after = {"a": {"b": 2, "c": (1,)}, "d": "x" * 70, "new": {"e": True}}
    assert list(changes(before, after)) == [
        "a.b: 1 -> 2",
        "a.c: [1, 2] -> [1]",
        f"d: x -> {'x' * 57}...",
        "new: nothing -> {'e': True}",
    ]
    assert differences(tmp_path / "params.yaml", "a: 1\nb: 2\n") == ["a: nothing -> 1", "b: nothing -> 2"]


def profile(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return in_this_process(project, "stages.profile", *arguments)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(FOLDER, tmp_path / "profiles")
    return tmp_path


def test_the_command_writes_both_files_and_says_what_changed(project: Path) -> None:
    made = profile(project, "default")
    assert made.returncode == 0, made.stderr
    rendered = render("default", FOLDER)
    assert (project / "params.yaml").read_text() == rendered.params
    assert (project / "studies/params.yaml").read_text() == rendered.studies
    changed = profile(project, "ci")
    lines = changed.stdout.splitlines()
    assert lines[:2] == ["params.yaml is the profile ci:", "  profile: default -> ci"]
    assert "  train.steps: 160 -> 24" in lines
    assert "  evaluation.budgets: [48, 96, 160, 256, 384, 512] -> [48, 64, 128, 192]" in lines
    assert parse(project / "params.yaml") == parse_text(render("ci", FOLDER).params)
    assert profile(project, "ci").stdout == "params.yaml is the profile ci, as it was.\n"


def test_changes_made_by_hand_are_overwritten_by_force_only(project: Path) -> None:
    assert profile(project, "default").returncode == 0
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("steps: 160", "steps: 161"))
    edited = path.read_text()
    for name in ("default", "ci"):
        refused = profile(project, name)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith(
            "error: params.yaml or studies/params.yaml was changed by hand, or the profile that it names since; save "
            f"what you need, then write {name}"
        )
        assert refused.stderr.count("\n") == 1
        assert path.read_text() == edited
    forced = profile(project, "default", "--force")
    assert forced.stdout == "params.yaml is the profile default:\n  train.steps: 161 -> 160\n"
    assert path.read_text() == render("default", FOLDER).params


def test_what_is_no_change_is_none(project: Path) -> None:
    assert profile(project, "default").returncode == 0
    path = project / "params.yaml"
    # Comments and order say nothing; a file that is broken was changed by somebody.
    path.write_text("# mine\n" + path.read_text())
    assert profile(project, "ci").returncode == 0
    path.write_text("a: [1\n")
    assert is_hand_made(path, FOLDER)
    assert profile(project, "ci").returncode == 1


def test_a_profile_that_does_not_exist_writes_nothing(project: Path) -> None:
    refused = profile(project, "huge")
    assert refused.returncode == 1
    assert refused.stderr == f"error: There is no profile huge; there are {', '.join(PROFILES)}.\n"
    assert not (project / "params.yaml").exists()
