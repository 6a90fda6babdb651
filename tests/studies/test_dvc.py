"""studies/ is a DVC project of its own: the one around it does not see it, and its paths are those of the code."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.closure import closure
from pipeline.params import load_params
from stages import _paths as stage_paths
from studies import _paths
from tests.test_pipeline import REPOSITORY, call, copy_tracked

STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load((REPOSITORY / "studies/dvc.yaml").read_text())["stages"]
CODE = ("../pipeline/", "../stages/", "../studies/")
# Where a stage's command begins.
STARTS = {
    "sensitivity_traces": "studies/sensitivity/traces.py",
    "sensitivity_train": "studies/sensitivity/train.py",
    "sensitivity": "studies/sensitivity/report.py",
    "latency": "studies/latency/__main__.py",
}


def of_matrix() -> set[str]:
    """The names of all studies' stages with the matrix of params.yaml."""
    matrix = load_params(REPOSITORY / "params.yaml").matrix
    traces = {f"sensitivity_traces@{model}-{name}" for model in matrix.model for name in matrix.trained_on}
    return {"sensitivity_train", "sensitivity"} | traces | {f"latency@{model}" for model in matrix.model}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, as a repository of their own in which nothing has run."""
    directory = tmp_path_factory.mktemp("copy")
    copy_tracked(directory)
    call(directory, "git", "init", "--quiet")
    call(directory, "git", "add", "--all")
    return directory


def test_the_project_around_the_studies_does_not_see_them(copy: Path) -> None:
    due = call(copy, "dvc", "status")
    assert "train@" in due
    assert not [name for name in (*of_matrix(), "studies/dvc.yaml") if name in due]
    everywhere = call(copy, "dvc", "stage", "list", "--all", "--name-only")
    assert "train@" in everywhere
    assert "latency" not in everywhere


def test_the_studies_project_lists_them(copy: Path) -> None:
    listed = call(copy / "studies", "dvc", "stage", "list", "--name-only").split()
    assert set(listed) == of_matrix()
    assert len(listed) == len(of_matrix())


def test_both_projects_work_without_a_repository(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, tmp_path / "files", ignore=shutil.ignore_patterns(".git"))
    for directory in (tmp_path / "files", tmp_path / "files/studies"):
        call(directory, "make", "--file", str(tmp_path / "files/Makefile"), "ready")
        assert call(directory, "dvc", "config", "--local", "core.no_scm").strip() == "true"
    listed = call(tmp_path / "files/studies", "dvc", "stage", "list", "--name-only").split()
    assert set(listed) == of_matrix()
    assert "latency" not in call(tmp_path / "files", "dvc", "stage", "list", "--all", "--name-only")


def test_outputs_lie_where_the_code_writes_them() -> None:
    outs = {
        Path("studies") / path: settings
        for stage in STAGES.values()
        for out in stage["outs"]
        for path, settings in out.items()
    }
    model, trained_on = "${item.model}", "${item.trained_on}"
    written = {_paths.traces(model, trained_on), _paths.SENSITIVITY, _paths.report("sensitivity")}
    assert set(outs) == written | {_paths.report("latency", model)}
    # What a study leaves, hidden states above all, must not lie on the disk twice.
    assert all(settings == {"cache": False} for settings in outs.values())


def test_what_studies_read_is_what_the_pipeline_writes() -> None:
    model, trained_on = "${item.model}", "${item.trained_on}"
    first = stage_paths.policy(model, "${matrix.trained_on[0]}", "${matrix.estimator[0]}")
    known = [stage_paths.model(model), stage_paths.check(model), stage_paths.traces(), first]
    known += [stage_paths.samples(model, trained_on, split) for split in ("train", "validation")]
    known += [stage_paths.source_state("benchmarks", trained_on)]
    read = {
        dep for stage in STAGES.values() for dep in stage["deps"] if dep.startswith("../") and not dep.startswith(CODE)
    }
    assert read == {f"../{path}" for path in known}


@pytest.mark.parametrize("name", STAGES)
def test_code_deps_are_the_files_that_the_command_imports(name: str) -> None:
    # No folders: DVC's own ignore file does not reach out of a project, so that __pycache__ would count.
    deps = {dep.removeprefix("../") for dep in STAGES[name]["deps"] if dep.startswith(CODE)}
    assert deps == closure(STARTS[name]).files


@pytest.mark.parametrize("name", STAGES)
def test_commands_run_in_the_repository_and_name_no_resources(name: str) -> None:
    command = STAGES[name]["cmd"]
    # What is fetched belongs to the checkout, not to the project inside of it.
    assert command.startswith("cd .. && DVC_ROOT=$DVC_ROOT/.. python -m studies.")
    assert not any(word in command for word in ("device", "thread", "worker", "cache-gb"))


def test_nothing_survives_a_change_of_what_it_depends_on() -> None:
    text = (REPOSITORY / "studies/dvc.yaml").read_text()
    assert not any(word in text for word in ("persist", "checkpoint:", "always_changed"))
