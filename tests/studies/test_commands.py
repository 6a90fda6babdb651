"""The command lines of the studies as a user meets them: help at once, one sentence for a mistake."""

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.profiles import Profile, render
from tests.commands import in_a_process, in_this_process

REPOSITORY = Path(__file__).parents[2]
MODEL = ("--model", "smollm2-135m")
COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("latency",): MODEL,
    ("harness",): MODEL,
    ("sensitivity", "traces"): (*MODEL, "--trained-on", "ruler"),
    ("sensitivity", "train"): (),
    ("sensitivity", "report"): (),
}


@pytest.fixture(scope="module")
def profile() -> Profile:
    return render("ci", REPOSITORY / "profiles")


@pytest.fixture
def directory(profile: Profile, tmp_path: Path) -> Path:
    """A folder with parameters and nothing that a study could read."""
    (tmp_path / "params.yaml").write_text(profile.params)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/params.yaml").write_text(profile.studies)
    return tmp_path


def study(directory: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return in_this_process(directory, f"studies.{name}", *arguments)


def assert_one_sentence(done: subprocess.CompletedProcess[str], message: str, directory: Path) -> None:
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert done.stdout == ""
    written = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert {name for name in written if not name.startswith(".")} == {"params.yaml", "studies/params.yaml"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_the_heavy_imports(command: tuple[str, ...], directory: Path) -> None:
    name, *rest = command
    done = in_a_process(directory, f"studies.{name}", *rest, "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert all(option in done.stdout for option in COMMANDS[command][::2])
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert "typer" in imported
    assert not imported & {"torch", "mlflow", "transformers", "kvpress", "polars", "pyarrow", "pandas", "matplotlib"}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_key_is_one_sentence(command: tuple[str, ...], directory: Path) -> None:
    with (directory / "params.yaml").open("a") as stream:
        stream.write("budgets: [64]\n")
    done = study(directory, *command, *COMMANDS[command])
    assert_one_sentence(done, r"^error: params\.yaml: unknown key budgets;", directory)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("latency",), r"models/smollm2-135m does not exist; run the stage that makes it"),
        (("harness",), r"models/smollm2-135m holds no model; run the model stage"),
        (("sensitivity", "traces"), r"samples/smollm2-135m/ruler/train\.parquet .*run the samples stage"),
        (("sensitivity", "train"), r"traces/smollm2-135m/ruler does not exist; run the stage that makes it"),
        (("sensitivity", "report"), r"results/sensitivity\.parquet does not exist"),
    ],
)
def test_missing_upstream_is_one_sentence(command: tuple[str, ...], message: str, directory: Path) -> None:
    assert_one_sentence(study(directory, *command, *COMMANDS[command]), message, directory)


@pytest.mark.parametrize("command", [("harness",), ("sensitivity", "traces"), ("sensitivity", "train")])
def test_a_device_that_is_not_there_is_one_sentence(command: tuple[str, ...], directory: Path) -> None:
    done = study(directory, *command, *COMMANDS[command], "--device", "cuda:99")
    assert_one_sentence(done, r"--device cuda:99 cannot be used \(.+\); choose another", directory)


def test_a_misfit_of_the_study_is_one_sentence(directory: Path) -> None:
    path = directory / "studies/params.yaml"
    path.write_text(path.read_text().replace("length: 1024", "length: 512"))
    done = study(directory, "sensitivity", "train")
    assert_one_sentence(done, r"studies/params\.yaml: sensitivity\.longer\.ruler: length 512 is not above", directory)


def test_without_a_command_the_commands_are_listed(directory: Path) -> None:
    done = study(directory, "sensitivity", "--help")
    assert all(command in done.stdout for command in ("traces", "train", "report"))
