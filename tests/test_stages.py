"""The command lines as a user meets them: help at once, one sentence for a mistake, nothing half-written."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.profiles import Profile, render
from tests.commands import ENVIRONMENT, in_a_process, in_this_process

REPOSITORY = Path(__file__).parent.parent
MODEL = ("--model", "smollm2-135m")
RULER = (*MODEL, "--benchmark", "ruler")
LEARNED = (*MODEL, "--trained-on", "ruler")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "sources": (),
    "model": MODEL,
    "check": MODEL,
    "samples": RULER,
    "traces": LEARNED,
    "train": (*LEARNED, "--estimator", "exact"),
    "evaluate": RULER,
    "score": RULER,
    "texts": RULER,
    "results": (),
    "report": (),
    "track": (),
    "ui": (),
    "chat": (*MODEL, "--policy", "policies/any"),
    "plan": (),
    "profile": ("ci",),
    "deps": (),
}
# MLflow keeps, for its process, the database that it opened first.
OF_A_PROCESS = ("track", "ui")


@pytest.fixture(scope="module")
def profile() -> Profile:
    return render("ci", REPOSITORY / "profiles")


@pytest.fixture
def directory(profile: Profile, tmp_path: Path) -> Path:
    """A folder with a params.yaml and nothing that a stage could read."""
    (tmp_path / "params.yaml").write_text(profile.params)
    return tmp_path


def stage(directory: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = in_a_process if name in OF_A_PROCESS else in_this_process
    return where(directory, f"stages.{name}", *arguments)


def heed_ctrl_c() -> None:
    """Whoever started the tests in the background lets their children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def assert_one_sentence(done: subprocess.CompletedProcess[str], message: str, directory: Path) -> None:
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert done.stdout == ""
    # Unfinished work may stay in .work; of outputs there must be none.
    written = {path.name for path in directory.iterdir()} - {".work", ".cache", "mlflow.db", "mlflow.db.lock"}
    assert written == {"params.yaml"}


def test_every_stage_is_tested() -> None:
    assert {path.stem for path in (REPOSITORY / "stages").glob("[a-z]*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_help_comes_without_the_heavy_imports(name: str, directory: Path) -> None:
    done = in_a_process(directory, f"stages.{name}", "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert all(option in done.stdout for option in ARGUMENTS[name][::2] if option.startswith("--"))
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert "typer" in imported
    assert not imported & {"torch", "mlflow", "transformers", "kvpress", "polars", "pyarrow", "pandas", "matplotlib"}


# ui shows what is logged, whatever params.yaml says now; plan may read a profile; the others write files.
UNCHECKED = ("ui", "profile", "deps", "plan")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_other_command_checks_the_whole_of_params(name: str) -> None:
    last = (REPOSITORY / f"stages/{name}.py").read_text().splitlines()[-1]
    assert re.fullmatch(r"    run\(\w+, checked=False\)" if name in UNCHECKED else r"    run\(\w+\)", last)


# What is checked, and when, is the same for all: see above.
@pytest.mark.parametrize("name", ["sources", "train", "report", "track", "plan"])
def test_an_unknown_key_is_one_sentence(name: str, directory: Path) -> None:
    with (directory / "params.yaml").open("a") as stream:
        stream.write("budgets: [64]\n")
    assert_one_sentence(
        stage(directory, name, *ARGUMENTS[name]), r"^error: params\.yaml: unknown key budgets;", directory
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", r"sources/state/models/smollm2-135m\.json names no sources .*run the sources stage"),
        ("check", r"models/smollm2-135m holds no model; run the model stage"),
        ("samples", r"sources/state/benchmarks/ruler\.json names no sources .*run the sources stage"),
        ("traces", r"samples/smollm2-135m/ruler/train\.parquet .*run the samples stage"),
        ("train", r"traces/smollm2-135m/ruler does not exist; run the stage that makes it"),
        ("evaluate", r"models/smollm2-135m does not exist; run the stage that makes it"),
        ("score", r"samples/smollm2-135m/ruler/test\.parquet .*run the samples stage"),
        ("texts", r"models/smollm2-135m does not exist; run the stage that makes it"),
        ("chat", r"policies/any holds no readable policy"),
        ("results", r"scores/smollm2-135m/ruler\.parquet does not exist"),
        ("report", r"results/evaluation\.parquet does not exist"),
        ("ui", r"MLflow at sqlite:////.*mlflow\.db has no runs yet; run make repro, or python -m stages\.track\."),
        ("track", r"policies/smollm2-135m/ruler/exact/config\.json does not exist; run the train stage"),
    ],
)
def test_missing_upstream_is_one_sentence(name: str, message: str, directory: Path) -> None:
    assert_one_sentence(stage(directory, name, *ARGUMENTS[name]), message, directory)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("check", ("--model", "gpt-5"), r"models has no 'gpt-5'; it has .*, smollm2-135m\."),
        ("samples", (*MODEL, "--benchmark", "wiki"), r"benchmarks has no 'wiki'; it has .*, dialogues, .*, ruler\."),
        ("traces", ("--model", "gpt-5", "--trained-on", "ruler"), r"models has no 'gpt-5'; it has .*, smollm2-135m\."),
        ("train", (*LEARNED, "--estimator", "ppo"), r"'ppo' is no estimator; known: exact, rloo, soft_rank\."),
        ("evaluate", ("--model", "gpt-5", "--benchmark", "ruler"), r"models has no 'gpt-5'; it has .*, smollm2-135m\."),
        ("texts", ("--model", "gpt-5", "--benchmark", "ruler"), r"models has no 'gpt-5'; it has .*, smollm2-135m\."),
    ],
)
def test_an_unknown_name_lists_the_known(name: str, arguments: tuple[str, ...], message: str, directory: Path) -> None:
    assert_one_sentence(stage(directory, name, *arguments), message, directory)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("traces", "gpu7"),
        ("train", "cuda:99"),
        ("evaluate", "cuda:99"),
        ("texts", "cuda:99"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(name: str, device: str, directory: Path) -> None:
    done = stage(directory, name, *ARGUMENTS[name], "--device", device)
    assert_one_sentence(done, rf"--device {device} cannot be used \(.+\); choose another", directory)


@pytest.mark.parametrize("name", ["samples", "traces", "train", "evaluate"])
def test_workers_without_ray_are_one_sentence(name: str, directory: Path) -> None:
    done = stage(directory, name, *ARGUMENTS[name], "--workers", "2")
    assert_one_sentence(done, r"--workers 2: the local executor is one worker; add --executor ray for more", directory)


def test_a_folder_without_params_is_one_sentence(directory: Path) -> None:
    (directory / "params.yaml").rename(directory / "other.yaml")
    done = in_a_process(directory, "stages.model", *MODEL)
    (directory / "other.yaml").rename(directory / "params.yaml")
    assert_one_sentence(done, r"params\.yaml does not exist; run from the repository root", directory)


def test_a_wrong_option_is_explained(directory: Path) -> None:
    done = stage(directory, "train", *LEARNED, "--estimators", "exact")
    assert done.returncode == 2
    assert "--estimators" in done.stderr
    assert "Traceback" not in done.stderr


FULL = """
from stages._app import run
def main():
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        raise RuntimeError("weights were not saved") from error
run(main)
"""


def test_a_full_disk_is_one_sentence_wherever_it_is_met(directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert_one_sentence(done, r"No space is left on the disk \(weights were not saved\); free some", directory)


IDLE = """
import time
from stages._app import run
def main():
    print("started", flush=True)
    time.sleep(300)
run(main)
"""
# Python drops an exception that is raised inside a __del__; a library's can be running when Ctrl-C is pressed.
IN_A_FINALISER = """
import time
from stages._app import progress, run
class Writer:
    def __del__(self):
        print("started", flush=True)
        time.sleep(300)
def main():
    with progress("work", 300) as advance:
        Writer()
        for _ in range(300):
            time.sleep(1)
            advance()
run(main)
"""


@pytest.mark.parametrize("program", [IDLE, IN_A_FINALISER])
def test_ctrl_c_ends_with_130_and_says_how_to_go_on(program: str, directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=directory, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in errors.splitlines() if line] == ["interrupted; run again to continue where it stopped."]
