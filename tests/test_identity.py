"""What makes a stage rerun: one thing is changed at a time in a copy of the project, and DVC is asked what is due.

Nothing is computed: every output is a file of a few bytes, which ``dvc commit`` takes for what the stages made.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

pytestmark = pytest.mark.usefixtures("dvc_parses_once")

REPOSITORY = Path(__file__).parents[1]
M = "smollm2-135m"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "KVP_"))}
ENVIRONMENT |= {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "DVC_NO_ANALYTICS": "true",
}


def dvc(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["dvc", *arguments], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as a project of their own, every stage up to date."""
    directory = tmp_path_factory.mktemp("identity") / "project"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file() and name != "dvc.lock":
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, directory / name)
    dvc(directory, "config", "--local", "core.no_scm", "true")
    stages = YAML(typ="safe").load(dvc_resolved(directory))
    for stage in stages.values():
        for out in (*stage.get("outs", ()), *stage.get("metrics", ()), *stage.get("plots", ())):
            path = directory / (out if isinstance(out, str) else next(iter(out)))
            if path.suffix:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(str(out))
            else:
                path.mkdir(parents=True, exist_ok=True)
                (path / "file").write_text(str(out))
    for name in ("train.parquet", "validation.parquet", "test.parquet"):
        for benchmark in ("ruler", "dialogues"):
            (directory / "samples" / M / benchmark / name).write_text(name)
    for kind, name in (("models", M), ("benchmarks", "ruler"), ("benchmarks", "dialogues")):
        (directory / f"sources/state/{kind}").mkdir(parents=True, exist_ok=True)
        (directory / f"sources/state/{kind}/{name}.json").write_text("{}")
    dvc(directory, "commit", "--force")
    return directory


def dvc_resolved(directory: Path) -> str:
    """All stages of the matrix, by name, as YAML."""
    command = (
        "import json, sys; from dvc.repo import Repo; repo = Repo('.');"
        "print(json.dumps({s.name: {'outs': [str(o) for o in s.outs]} for s in repo.index.stages}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return done.stdout


def due(directory: Path) -> set[str]:
    """Names of the stages that ``dvc status`` names."""
    with patch.dict(os.environ, ENVIRONMENT, clear=True), contextlib.chdir(directory), Repo() as repo:
        return set(repo.status())


@pytest.fixture
def changed(project: Path) -> Iterator[Callable[..., set[str]]]:
    """Change one file of the project by a function of its text; returns what is due, and puts it back afterwards."""
    before: dict[Path, str | None] = {}

    def change(name: str, edit: Callable[[str], str]) -> set[str]:
        path = project / name
        before[path] = path.read_text() if path.exists() else None
        path.write_text(edit(before[path] or ""))
        return due(project)

    yield change
    for path, text in before.items():
        if text is None:
            path.unlink()
        else:
            path.write_text(text)


def comment(text: str) -> str:
    """A change of the code, whatever it says."""
    return text + "\n# changed\n"


def params(edit: Callable[[Any], None]) -> Callable[[str], str]:
    """A change of params.yaml."""

    def apply(text: str) -> str:
        tree = YAML(typ="safe").load(text)
        edit(tree)
        return json.dumps(tree)

    return apply


def of(stage: str, *entries: str) -> set[str]:
    return {f"{stage}@{M}-{entry}" for entry in entries}


BENCHMARKS = ("ruler", "dialogues")
SAMPLES, TRACES, EVALUATE, SCORE, TEXTS = (
    of(stage, *BENCHMARKS) for stage in ("samples", "traces", "evaluate", "score", "texts")
)
TRAIN = of("train", *(f"{benchmark}-{estimator}" for benchmark in BENCHMARKS for estimator in ("exact", "rloo")))
RLOO = {stage for stage in TRAIN if stage.endswith("rloo")}
CHECK, MODEL = {f"check@{M}"}, {f"model@{M}"}


def test_nothing_is_due_after_a_run(project: Path) -> None:
    assert due(project) == set()
    assert json.loads(dvc(project, "status", "--json")) == {}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        # The frame of the command line, errors, validation, and what only names or keeps.
        ("stages/_app.py", set()),
        ("pipeline/errors.py", set()),
        ("pipeline/section.py", set()),
        ("pipeline/params.py", set()),
        ("pipeline/work.py", set()),
        ("pipeline/tracking/trainings.py", set()),
        ("profiles/ci.yaml", set()),
        ("tests/conftest.py", set()),
        ("stages/train.py", TRAIN),
        ("pipeline/policy/estimators/rloo.py", RLOO),
        ("pipeline/policy/estimators/soft_rank.py", set()),
        ("pipeline/policy/train.py", TRAIN),
        ("pipeline/policy/agents.py", CHECK | TRAIN | EVALUATE | TEXTS),
        ("pipeline/traces/capture.py", CHECK | TRACES | EVALUATE | TEXTS),
        ("pipeline/traces/shards.py", TRACES | TRAIN),
        ("pipeline/policy/batches.py", TRAIN),
        ("pipeline/policy/job.py", TRAIN),
        ("pipeline/executor/units.py", set()),
        ("pipeline/executor/on_ray.py", set()),
        ("pipeline/evaluation/decode.py", CHECK | EVALUATE),
        ("pipeline/evaluation/score.py", SCORE),
        ("pipeline/evaluation/texts.py", TEXTS),
        ("pipeline/eviction/rankers.py", CHECK | EVALUATE | TEXTS),
        ("pipeline/ruler/generator.py", {"sources", "report"} | SAMPLES | SCORE),
        ("pipeline/models/load.py", MODEL | CHECK | TRACES | EVALUATE | TEXTS),
        ("pipeline/benchmarks/dialogues.py", {"sources", "report"} | SAMPLES | SCORE),
        ("pipeline/benchmarks/new.py", {"sources", "report"} | SAMPLES | SCORE),
        ("pipeline/models/export.py", MODEL),
        ("pipeline/reporting/plots.py", {"report"}),
        ("pipeline/reporting/styles.py", {"results", "report"}),
        ("pipeline/reporting/page.py", {"report"}),
    ],
)
def test_changed_code(changed: Callable[..., set[str]], file: str, expected: set[str]) -> None:
    assert changed(file, comment) == expected


def add_boolq(tree: Any) -> None:
    tree["matrix"]["benchmark"].append("boolq")


def longer_ruler(tree: Any) -> None:
    tree["benchmarks"]["ruler"]["samples"]["length"] += 8


def budgets_of_dialogues(tree: Any) -> None:
    tree["benchmarks"]["dialogues"]["evaluate"]["budgets"] = [64, 128]


def title_of_ruler(tree: Any) -> None:
    tree["benchmarks"]["ruler"]["shown"]["title"] = "Ruler"


def more_rankings(tree: Any) -> None:
    tree["estimators"]["rloo"]["samples"] += 1


def fewer_tokens(tree: Any) -> None:
    tree["traces"]["tokens"] -= 1


def smaller_rate(tree: Any) -> None:
    tree["train"]["learning_rate"] /= 2


def one_baseline_less(tree: Any) -> None:
    del tree["baselines"]["tova"]
    del tree["report"]["titles"]["tova"]


def other_pin(tree: Any) -> None:
    tree["sources"]["doc2dial"]["sha256"] = "0" * 64


def other_profile(tree: Any) -> None:
    tree["profile"] = "mine"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            add_boolq,
            {"sources", "results", "report"} | of("samples", "boolq") | of("evaluate", "boolq") | of("score", "boolq"),
        ),
        (longer_ruler, {"sources", "results", "report"} | of("samples", "ruler") | of("score", "ruler")),
        (budgets_of_dialogues, {"sources", "results", "report"} | of("evaluate", "dialogues")),
        (title_of_ruler, {"sources", "results", "report"}),
        (more_rankings, RLOO),
        (fewer_tokens, TRACES),
        (smaller_rate, TRAIN | {"report"}),
        (one_baseline_less, EVALUATE | TEXTS | {"results", "report"}),
        (other_pin, {"sources"}),
        (other_profile, set()),
    ],
)
def test_changed_params(changed: Callable[..., set[str]], edit: Callable[[Any], None], expected: set[str]) -> None:
    assert changed("params.yaml", params(edit)) == expected


def test_a_studys_code_and_parameters_are_no_matter_of_the_pipeline(changed: Callable[..., set[str]]) -> None:
    assert changed("studies/params.yaml", comment) == set()
    assert changed("studies/latency/__main__.py", comment) == set()


def test_an_equal_output_stops_what_follows(project: Path) -> None:
    # That a stage is due makes none of those due that read its outputs: these are compared by content.
    (project / "policies" / M / "ruler/rloo/file").write_text("other weights")
    try:
        assert due(project) == of("train", "ruler-rloo") | EVALUATE | TEXTS | {"results", "report"}
    finally:
        (project / "policies" / M / "ruler/rloo/file").write_text(f"policies/{M}/ruler/rloo")
    assert due(project) == set()
