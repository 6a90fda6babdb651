"""One call of one script: its rows are NVIDIA's, and it ends whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.ruler.generator import Host, generate, host
from pipeline.ruler.wheel import Task
from tests.conftest import REPOSITORY
from tests.executor.jobs import until

KEY = "benchmarks.ruler.samples.task_lengths"


@pytest.mark.slow
def test_samples_equal_those_of_the_official_script(
    tasks: dict[str, Task],
    ruler_wheel: Path,
    nltk_data: Path,
    smollm2: Path,
    jobs: Host,
    tmp_path: Path,
) -> None:
    """NVIDIA's prepare.py (always seed 42, base template) writes the rows that we get from its scripts."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ruler_wheel),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NLTK_DATA": str(nltk_data),
        "HF_HUB_OFFLINE": "1",
    }

    def official(name: str, length: int) -> list[dict]:
        command = [str(python), str(ruler_wheel / "long_context_eval/data/prepare.py"), "--task", name]
        command += ["--save_dir", str(tmp_path / "official"), "--tokenizer_type", "hf"]
        command += ["--tokenizer_path", str(smollm2), "--max_seq_length", str(length), "--num_samples", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        written = tmp_path / "official" / name / "validation.jsonl"
        assert written.is_file(), done.stdout
        return [json.loads(line) for line in written.read_text().splitlines()]

    lengths = dict.fromkeys(("niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe"), 1024)
    lengths["qa_1"] = 1792
    with ThreadPoolExecutor(2) as pool:
        expected = dict(zip(lengths, pool.map(official, lengths, lengths.values()), strict=True))
    for name, length in lengths.items():
        ours = generate(
            tasks[name],
            ruler_wheel,
            smollm2,
            jobs,
            tmp_path / name,
            length=length,
            samples=2,
            seed=42,
            key=KEY,
            official=True,
        )
        assert ours == expected[name], name


@pytest.mark.parametrize(
    ("name", "length"),
    # The essay task would silently make samples without a haystack, the others would loop forever.
    [("niah_single_2", 512), ("qa_1", 1024), ("qa_2", 1024), ("niah_single_1", 256)],
)
def test_a_task_that_does_not_fit_is_named_with_its_key(
    tasks: dict[str, Task],
    ruler_wheel: Path,
    smollm2: Path,
    jobs: Host,
    tmp_path: Path,
    name: str,
    length: int,
) -> None:
    with pytest.raises(
        PipelineError, match=rf"{name} into {length} tokens.*benchmarks\.ruler\.samples\.task_lengths\.{name}\."
    ):
        generate(tasks[name], ruler_wheel, smollm2, jobs, tmp_path, length=length, samples=2, seed=42, key=KEY)
    assert_ended(tmp_path)


def test_a_length_that_is_all_answer_is_refused(
    tasks: dict[str, Task], ruler_wheel: Path, smollm2: Path, jobs: Host, tmp_path: Path
) -> None:
    # The generator would take it for a perfect fit.
    with pytest.raises(PipelineError, match="niah_single_1 into 128 tokens"):
        generate(tasks["niah_single_1"], ruler_wheel, smollm2, jobs, tmp_path, length=128, samples=1, seed=1, key=KEY)


def test_a_script_that_loops_is_ended_by_its_time_limit(
    tasks: dict[str, Task], ruler_wheel: Path, smollm2: Path, jobs: Host, tmp_path: Path
) -> None:
    # Ten documents of the first question fit, those of the third do not.
    with pytest.raises(PipelineError, match=r"cannot fit qa_2 into 1664 tokens"):
        generate(
            tasks["qa_2"], ruler_wheel, smollm2, jobs, tmp_path, length=1664, samples=3, seed=42, key=KEY, time_limit=5
        )
    assert_ended(tmp_path)


def test_a_script_ends_with_its_host(
    tasks: dict[str, Task], ruler_wheel: Path, nltk_data: Path, smollm2: Path, tmp_path: Path
) -> None:
    # In a new interpreter, for which the host need not get ready.
    options = {"length": 1664, "samples": 3, "seed": 42, "official": True, "key": KEY}
    with ThreadPoolExecutor(1) as pool, host(nltk_data, tmp_path / "host.log") as process:
        looping = pool.submit(generate, tasks["qa_2"], ruler_wheel, smollm2, process, tmp_path, **options)
        until((tmp_path / "run/log").is_file, "the script")
    with pytest.raises(PipelineError, match=r"could not be started or has died; see host\.log"):
        looping.result()
    assert_ended(tmp_path)


HOLDER = """
import sys, threading
from pathlib import Path
from pipeline.ruler.generator import generate, host
from pipeline.ruler.wheel import read_tasks
wheel, nltk_data, model, out = map(Path, sys.argv[1:])
options = {"length": 1664, "samples": 3, "seed": 42, "official": True, "key": ""}
with host(nltk_data, out / "host.log") as process:
    generate(read_tasks(wheel)["qa_2"], wheel, model, process, out, **options)
"""


def test_a_script_ends_with_the_process_that_asked_for_it(
    ruler_wheel: Path, nltk_data: Path, smollm2: Path, tmp_path: Path
) -> None:
    places = [str(path) for path in (ruler_wheel, nltk_data, smollm2, tmp_path)]
    with subprocess.Popen([sys.executable, "-c", HOLDER, *places], cwd=REPOSITORY) as holder:
        try:
            until((tmp_path / "run/log").is_file, "the script")
        finally:
            holder.kill()
    assert_ended(tmp_path)


def assert_ended(scratch: Path) -> None:
    """No process of the job's group is left."""
    group = int((scratch / "run/job.pid").read_text())
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("the generator's processes were left running")


def test_a_script_that_fails_is_quoted(tasks: dict[str, Task], ruler_wheel: Path, jobs: Host, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"failed on vt: .+ \(see ") as caught:
        generate(
            tasks["vt"], ruler_wheel, tmp_path / "no-model", jobs, tmp_path, length=512, samples=1, seed=1, key=KEY
        )
    assert "\n" not in str(caught.value)


def test_a_dead_host_is_reported(
    tasks: dict[str, Task], ruler_wheel: Path, nltk_data: Path, smollm2: Path, tmp_path: Path
) -> None:
    with host(nltk_data, tmp_path / "host.log") as process:
        process.kill()
        process.wait()
        with pytest.raises(PipelineError, match=r"could not be started"):
            generate(tasks["vt"], ruler_wheel, smollm2, process, tmp_path, length=512, samples=1, seed=1, key=KEY)
