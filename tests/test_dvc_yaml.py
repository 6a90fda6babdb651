"""DVC cannot see Python imports, so these tests hold dvc.yaml and studies/dvc.yaml to them."""

import ast
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.params import Params, load_params

REPOSITORY = Path(__file__).parent.parent
DVC = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())
STUDIES = YAML(typ="safe").load((REPOSITORY / "studies/dvc.yaml").read_text())
STAGES: dict[str, dict[str, Any]] = DVC["stages"] | STUDIES["stages"]
# Logging changes no result, so a change to it must not retrain anything.
NOT_A_DEPENDENCY = {Path("pipeline/tracking.py"), Path("pipeline/mlflow_store.py")}


def module_file(name: str) -> Path | None:
    """File of a module of this project, relative to the repository; None for all others."""
    path = Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if path.parts[0] in ("pipeline", "stages") and (REPOSITORY / candidate).is_file():
            return candidate
    return None


def imports(file: Path) -> set[Path]:
    """Files of this project that ``file`` imports, inside functions too, with the packages around them."""
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not followed here"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    packages = {".".join(name.split(".")[:length]) for name in names for length in range(1, name.count(".") + 1)}
    return {path for name in names | packages if (path := module_file(name)) is not None}


def reachable(start: Path) -> set[Path]:
    """All files of this project that running ``start`` may import, itself included."""
    found, queue = set(), [start]
    while queue:
        file = queue.pop()
        if file not in found and file not in NOT_A_DEPENDENCY:
            found.add(file)
            queue += imports(file)
    return found


def entry_point(stage: str) -> Path:
    match = re.match(r"python -m (stages\.\w+)\b", STAGES[stage]["cmd"])
    assert match, f"{stage}: the command is no module of stages/"
    file = module_file(match[1])
    assert file is not None
    return file


def is_trivial(file: Path) -> bool:
    """Whether a file holds nothing but a docstring."""
    return all(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for node in ast.parse((REPOSITORY / file).read_text()).body
    )


def source_deps(stage: str) -> list[Path]:
    return [Path(dep) for dep in STAGES[stage]["deps"] if dep.startswith(("pipeline/", "stages/"))]


@pytest.mark.parametrize("stage", STAGES)
def test_deps_cover_the_imports(stage: str) -> None:
    deps = source_deps(stage)
    uncovered = {
        file
        for file in reachable(entry_point(stage))
        if not any(file.is_relative_to(dep) for dep in deps) and not (file.name == "__init__.py" and is_trivial(file))
    }
    assert not uncovered, f"add to the deps of {stage}: {', '.join(sorted(map(str, uncovered)))}"


@pytest.mark.parametrize("stage", STAGES)
def test_deps_name_no_source_that_is_not_imported(stage: str) -> None:
    imported = reachable(entry_point(stage))
    unused = {dep for dep in source_deps(stage) if not any(file.is_relative_to(dep) for file in imported)}
    assert not unused, f"drop from the deps of {stage}: {', '.join(sorted(map(str, unused)))}"


def test_the_walk_sees_imports_inside_functions() -> None:
    # Stages import inside their functions; a walk that misses them would make the tests above vacuous.
    found = reachable(Path("stages/evaluate.py"))
    assert {
        Path("pipeline/evaluation/sweep.py"),
        Path("pipeline/policy/ranking.py"),
        Path("pipeline/errors.py"),
    } <= found
    assert Path("pipeline/policy/train.py") not in found


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_sections_of_params_yaml(stage: str) -> None:
    sections = set(Params.model_fields)
    for name in STAGES[stage].get("params", []):
        # A mapping would name another file, or a whole file; a bare "params.yaml" likewise.
        assert isinstance(name, str)
        section, *rest = name.split(".")
        assert section in sections
        # A study may depend on some of its axes only: what it captures must outlive a change of the others.
        assert not rest or section in ("models", "corpora", "sensitivity")


@pytest.mark.parametrize("stage", STAGES)
def test_run_time_resources_are_no_params(stage: str) -> None:
    assert not re.search(r"device|thread|worker|cache_gb", STAGES[stage]["cmd"])
    keys = load_params(REPOSITORY / "params.yaml").model_dump()

    def names(node: Any) -> set[str]:
        return set(node) | set().union(*map(names, node.values())) if isinstance(node, dict) else set()

    assert not {name for name in names(keys) if re.search(r"device|thread|worker|cache_gb", name)}


def test_studies_are_no_part_of_the_default_pipeline() -> None:
    # `dvc repro` runs the stages of ./dvc.yaml and what they depend on.
    assert not DVC["stages"].keys() & STUDIES["stages"].keys()
    default = {dep for stage in DVC["stages"].values() for dep in stage["deps"]}
    for name, stage in STUDIES["stages"].items():
        assert stage["wdir"] == "..", name
        # An output in the cache that no run has made yet would make `dvc pull` fail.
        outs = {path: settings for out in stage["outs"] for path, settings in out.items()}
        assert all(settings == {"cache": False} for settings in outs.values()), name
        assert not outs.keys() & default


def test_a_fan_in_lists_the_matrix() -> None:
    # A stage that reads a directory of many outputs must notice when an entry is dropped.
    fanned = {
        "evaluations",
        "examples",
        "policies",
        "samples",
        "models",
        "traces",
        "study_traces",
        "policies/${item.model}",
    }
    for name, stage in STAGES.items():
        if fanned & set(stage.get("deps", [])):
            assert "matrix" in stage["params"], name


def outputs() -> set[str]:
    found = set()
    for stage in STAGES.values():
        for out in itertools.chain(*(stage.get(kind, []) for kind in ("outs", "metrics", "plots"))):
            found.add(out if isinstance(out, str) else next(iter(out)))
    return found


def test_every_plot_is_an_output_with_a_template() -> None:
    assert DVC["plots"]
    for plot in DVC["plots"]:
        ((name, settings),) = plot.items()
        assert name in outputs()
        assert (REPOSITORY / settings["template"]).is_file()


def test_no_output_survives_a_change_of_what_it_depends_on() -> None:
    # persist keeps stale shards and switches the run cache off.
    for file in ("dvc.yaml", "studies/dvc.yaml"):
        text = (REPOSITORY / file).read_text()
        assert "persist" not in text
        assert "checkpoint:" not in text
        assert "always_changed" not in text
