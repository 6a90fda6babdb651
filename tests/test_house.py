"""Which room imports which: down the floors of docs/ARCHITECTURE.md only, and heavy libraries where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.closure import NO_BYTES, executed

REPOSITORY = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(REPOSITORY)
    for folder in ("pipeline", "stages", "studies", "perf")
    for path in (REPOSITORY / folder).rglob("*.py")
)


def _floors() -> dict[str, int]:
    """room -> its floor, from the table of docs/ARCHITECTURE.md. A room may be one file."""
    table = (REPOSITORY / "docs/ARCHITECTURE.md").read_text().partition("## Which room imports which")[2]
    found: dict[str, int] = {}
    for number, rooms in re.findall(r"^\| (\d+) \| ([^|]+) \|", table, flags=re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`([\w.]+)`", rooms), int(number))
    return found


FLOORS = _floors()
# What a floor allows and a room must not have all the same: (room, room it does not import).
NEVER = {
    ("pipeline.reporting", "pipeline.evaluation"),
    ("pipeline.reporting", "pipeline.benchmarks"),
    ("pipeline.reporting", "pipeline.eviction"),
    ("pipeline.reporting", "pipeline.models"),
    ("pipeline.tracking", "pipeline.evaluation"),
    ("pipeline.tracking", "pipeline.benchmarks"),
    ("pipeline.eviction", "pipeline.benchmarks"),
    ("pipeline.policy", "pipeline.benchmarks"),
    ("pipeline.policy", "pipeline.samples"),
}
# Judging an answer is the one thing of the evaluation that needs to know a benchmark.
JUDGES = {Path("pipeline/evaluation/score.py")}


def room_of(module: str) -> str | None:
    """The room that a dotted name lies in; None outside of the house."""
    parts = module.split(".")
    if parts[0] in ("stages", "studies", "perf"):
        return parts[0]
    if parts[0] != "pipeline" or len(parts) == 1:
        return None
    return ".".join(parts[:2])


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports, inside functions too, but for type checkers."""
    names: set[str] = set()
    for node in executed(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down_the_floors(file: Path) -> None:
    own = room_of(".".join(file.with_suffix("").parts))
    if own is None:
        assert not {name for name in imported(file) if name.startswith("pipeline")}
        return
    for name in imported(file):
        other = room_of(name)
        if other is None or other == own:
            continue
        assert FLOORS[own] > FLOORS[other], f"{file}: {own} stands below {other}, or beside it, and imports {name}"
        assert (own, other) not in NEVER, f"{file} imports {name}"
        if own == "pipeline.evaluation" and other == "pipeline.benchmarks":
            assert file in JUDGES, f"{file} imports {name}"


def test_every_room_has_a_floor() -> None:
    rooms = {room for file in FILES if (room := room_of(".".join(file.with_suffix("").parts)))}
    assert rooms - {"pipeline.__init__"} == set(FLOORS)


def test_a_break_of_the_rules_is_seen(tmp_path: Path) -> None:
    # The checks above would pass on files without imports: hold the way they are found to a known file.
    assert "pipeline.policy.agents.Policy" in imported(Path("pipeline/evaluation/prefill.py"))
    assert room_of("pipeline.policy.agents.Policy") == "pipeline.policy"
    assert FLOORS["pipeline.evaluation"] > FLOORS["pipeline.policy"] > FLOORS["pipeline.samples"]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_opens_with_what_it_holds(file: Path) -> None:
    assert ast.get_docstring(ast.parse((REPOSITORY / file).read_text()))


def test_checking_params_loads_no_heavy_library() -> None:
    # Every stage does so before it starts.
    command = "import sys, pipeline.params; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"transformers", "kvpress", "matplotlib", "mlflow", "dvc", "datasets"} & set(done.stdout.split())


def test_what_changes_no_byte_is_little() -> None:
    assert len(NO_BYTES) <= 11
    for name, reason in NO_BYTES.items():
        assert (REPOSITORY / name).exists()
        assert reason


def test_kvpress_is_known_to_the_eviction_room_alone() -> None:
    users = {file for file in FILES if any(name.split(".")[0] == "kvpress" for name in imported(file))}
    assert {str(file.parents[-3]) for file in users if file.parts[0] == "pipeline"} == {"pipeline/eviction"}


def test_no_kind_of_benchmark_is_known_outside_of_its_file() -> None:
    for file in FILES:
        if file.parts[:2] != ("pipeline", "benchmarks"):
            text = (REPOSITORY / file).read_text()
            assert not re.search(r"(samples|benchmark|made|params)\.kind ==", text), f"{file} branches on a kind"
