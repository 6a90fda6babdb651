"""DVC sees neither imports nor what is read: these tests hold dvc.yaml to them, and to where outputs lie."""

import ast
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.closure import closure
from stages import _paths
from stages.deps import FILES, code_deps, rewritten

REPOSITORY = Path(__file__).parent.parent
DVC = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())
STAGES: dict[str, dict[str, Any]] = DVC["stages"]
# Stages that read outputs of the whole matrix.
FAN_INS = {"results", "report"}
# What a stage reads through a function of a room in place of read("...").
READS = {
    "read_benchmark(benchmark)": "benchmarks.${item.benchmark}.samples",
    "read_benchmark(name)": "benchmarks",
    "read_dtype(model)": "models.${item.model}.dtype",
}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_code_deps_are_the_imports(file: Path) -> None:
    text = (REPOSITORY / file).read_text()
    assert rewritten(text, FILES[file]) == text, "run python -m stages.deps"


def test_the_walk_sees_imports_inside_functions() -> None:
    # Stages import inside their functions; a walk that misses them would make the test above vacuous.
    found = code_deps("python -m stages.evaluate --model ${item.model}")
    assert {"pipeline/evaluation/sweep.py", "pipeline/policy/ranking.py", "pipeline/eviction/baselines"} <= set(found)
    assert "pipeline/policy/train.py" not in found
    assert "pipeline/errors.py" not in found
    assert "pipeline/benchmarks" not in found


def test_an_estimator_is_named_exactly_and_imports_nothing_that_train_does_not() -> None:
    estimators = sorted((REPOSITORY / "pipeline/policy/estimators").glob("*.py"))
    train = set(code_deps("python -m stages.train --estimator ${item.estimator}"))
    assert "pipeline/policy/estimators/${item.estimator}.py" in train
    assert "pipeline/policy/estimators" not in train
    for path in estimators:
        own = str(path.relative_to(REPOSITORY))
        beside = closure(own, {"pipeline/policy/estimators": ()}).files - {own}
        assert beside <= {"pipeline/policy/estimators/base.py", "pipeline/policy/ranking.py"} & train, own


def keys_read(stage: str) -> set[str]:
    """The keys of params.yaml that a stage reads, as dvc.yaml would spell them."""
    text = (REPOSITORY / f"stages/{stage}.py").read_text()
    found = {key for call, key in READS.items() if call in text}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "read":
            key = node.args[0]
            parts = key.values if isinstance(key, ast.JoinedStr) else [key]
            found.add("".join(_spelled(part) for part in parts))
    # A fan-in reads entries one by one, and depends on all.
    return {"benchmarks" if key.startswith("benchmarks.${item.name}") else key for key in found}


def _spelled(part: ast.AST) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    assert isinstance(part.value, ast.Name)
    return f"${{item.{part.value.id}}}"


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_keys_that_a_stage_reads(stage: str) -> None:
    assert set(STAGES[stage].get("params", ())) == keys_read(stage)
    assert ("matrix" in STAGES[stage].get("params", ())) == (stage in FAN_INS)


@pytest.mark.parametrize("stage", STAGES)
def test_run_time_resources_are_no_params(stage: str) -> None:
    assert not re.search(r"device|thread|worker|cache_gb", STAGES[stage]["cmd"])
    keys = YAML(typ="safe").load((REPOSITORY / "params.yaml").read_text())

    def names(node: Any) -> set[str]:
        return set(node) | set().union(*map(names, node.values())) if isinstance(node, dict) else set()

    assert not {name for name in names(keys) if re.search(r"device|thread|worker|cache_gb", name)}


def outputs() -> set[str]:
    found = set()
    for stage in STAGES.values():
        for out in itertools.chain(*(stage.get(kind, []) for kind in ("outs", "metrics", "plots"))):
            found.add(out if isinstance(out, str) else next(iter(out)))
    return found


def test_outputs_lie_where_the_stages_look_for_them() -> None:
    model, benchmark = "${item.model}", "${item.benchmark}"
    trained_on, estimator = "${item.trained_on}", "${item.estimator}"
    expected = {
        _paths.source_state(),
        _paths.model(model),
        _paths.check(model),
        _paths.samples(model, benchmark),
        _paths.traces(model, trained_on),
        _paths.policy(model, trained_on, estimator),
        _paths.answers(model, benchmark),
        _paths.scores(model, benchmark),
        _paths.texts(model, benchmark),
    }
    folders = (_paths.RESULTS, _paths.METRICS, _paths.PLOTS, _paths.REPORTS)
    merged = {out for out in outputs() if Path(out).parts[0] in map(str, folders)}
    assert outputs() - merged == set(map(str, expected))
    assert {Path(out).parts[0] for out in merged} == set(map(str, folders))


def test_no_source_may_lie_where_stages_write() -> None:
    from pipeline.sources.pins import OWNED

    assert {Path(out).parts[0] for out in outputs()} <= set(OWNED)


def test_every_plot_is_an_output_with_a_template() -> None:
    assert DVC["plots"]
    for plot in DVC["plots"]:
        ((name, settings),) = plot.items()
        assert name in outputs()
        assert (REPOSITORY / settings["template"]).is_file()


def test_no_output_survives_a_change_of_what_it_depends_on() -> None:
    # persist keeps stale shards and switches the run cache off.
    for file in FILES:
        text = (REPOSITORY / file).read_text()
        assert "persist" not in text
        assert "checkpoint:" not in text
        assert "always_changed" not in text
