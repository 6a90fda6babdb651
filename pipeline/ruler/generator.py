"""One call of one of NVIDIA's scripts: start it, watch it, kill it, read its rows. It knows no splits.

The scripts parse their arguments at import, so they run as subprocesses on an unpacked wheel.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.errors import PipelineError
from pipeline.files import write_text
from pipeline.ruler import host as host_program
from pipeline.ruler.wheel import Task
from pipeline.samples.rows import FilledText, Row, RowModel, read_rows, validated

Host = subprocess.Popen[str]

# Printed before the samples are made; zero or less means that not even the smallest haystack fits.
_HAYSTACK = re.compile(r"^(?:Num haystack|Num noises|num_words|Number of documents): (-?\d+)$", re.MULTILINE)


@contextmanager
def host(nltk_data: Path, log: Path) -> Iterator[Host]:
    """Start the process in whose forks the scripts run, and yield it; when it ends, so do they.

    The scripts cannot be imported, and starting Python with transformers anew for each of them would
    take longer than all else (``pipeline/ruler/host.py``). What it complains of is added to ``log``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "NLTK_DATA": str(nltk_data.resolve()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(host_program.__file__))]
    with log.open("ab") as errors, tempfile.TemporaryFile() as nothing:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=nothing, stderr=errors, env=environment, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()


def generate(
    task: Task,
    package: Path,
    model: Path,
    jobs: Host,
    scratch: Path,
    *,
    length: int,
    samples: int,
    seed: int,
    official: bool = False,
    time_limit: float | None = None,
    key: str,
) -> list[Row]:
    """Run one of NVIDIA's scripts and return its rows (index, input, outputs, length).

    Parameters
    ----------
    package
        Directory that holds ``long_context_eval``.
    jobs
        From :func:`host`; where another thread ends it, the script is killed.
    scratch
        Directory of this call alone, for its output and log.
    length
        The script's max_seq_length: tokens of the bare prompt plus those kept for the answer.
    official
        Whether the rows must be those that NVIDIA's prepare.py would write here. Only a new interpreter
        draws the same random numbers, and takes seconds to start.
    time_limit
        Seconds before the script is killed; by default generous for this many samples.
    key
        Where params.yaml holds the lengths, for the error.

    Raises
    ------
    PipelineError
        The task does not fit into ``length``, on which the script would loop forever, or it fails, or the host is
        gone.
    """
    too_short = PipelineError(
        f"RULER's generator cannot fit {task.name} into {length} tokens; raise params.yaml's {key}.{task.name}."
    )
    if length <= task.tokens_to_generate:
        raise too_short
    run = (scratch / "run").resolve()
    run.mkdir(parents=True)
    arguments = ["--save_dir", str(run), "--save_name", task.name, "--subset", "rows"]
    arguments += ["--tokenizer_type", "hf", "--tokenizer_path", str(model.resolve())]
    arguments += ["--max_seq_length", str(length), "--tokens_to_generate", str(task.tokens_to_generate)]
    arguments += ["--num_samples", str(samples), "--random_seed", str(seed), *task.arguments]
    # NVIDIA's "base" model template: the task's template, then the answer prefix.
    arguments += ["--template", task.template + task.answer_prefix]
    log = run / "log"
    job = {
        "script": str(package.resolve() / "long_context_eval/data/synthetic" / f"{task.script}.py"),
        "arguments": arguments,
        "package": str(package.resolve()),
        "directory": str(run),
        "fresh": official,
        "log": str(log),
        "time_limit": 120 + samples * length // 1000 if time_limit is None else int(time_limit),
    }
    write_text(run / "job.json", json.dumps(job))
    status = _run_job(run / "job.json", jobs, log)
    output = log.read_text(errors="replace") if log.is_file() else ""
    if _nothing_fits(output):
        raise FirstDrawError(str(too_short))
    if status == -signal.SIGALRM:
        raise too_short
    if status:
        lines = [line for line in output.splitlines() if line.strip()]
        reason = lines[-1] if lines else "no output"
        raise PipelineError(f"RULER's generator failed on {task.name}: {reason} (see {scratch}).")
    return checked_rows(run / task.name / "rows.jsonl", read_rows(run / task.name / "rows.jsonl"))


def _run_job(job: Path, jobs: Host, log: Path) -> int:
    """Exit status of the job's script; it is killed when nothing fits."""
    pid, status = job.with_suffix(".pid"), job.with_suffix(".status")
    try:
        if jobs.stdin is not None:
            jobs.stdin.write(f"{job}\n")
            jobs.stdin.flush()
        while not status.is_file():
            if jobs.poll() is not None:
                raise BrokenPipeError
            if log.is_file() and _nothing_fits(log.read_text(errors="replace")):
                return -signal.SIGKILL
            time.sleep(0.1)
        return int(status.read_text())
    except BrokenPipeError:
        raise PipelineError(
            "RULER's generator could not be started or has died; see host.log in the stage's .work folder."
        ) from None
    finally:
        # The script's group goes with it, whatever interrupts this call.
        if not status.is_file() and pid.is_file():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


def _nothing_fits(output: str) -> bool:
    sizes = _HAYSTACK.findall(output)
    return bool(sizes) and int(sizes[-1]) <= 0


class FirstDrawError(PipelineError):
    """The generator's very first try was too long for the length."""


class _GeneratedRow(RowModel):
    input: FilledText
    outputs: Annotated[list[FilledText], Field(min_length=1)]
    length: int
    index: int


def checked_rows(file: Path, rows: Any) -> list[Row]:
    """The rows as they are, if a prompt and its answers can be made from each."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PipelineError(f"{file} holds no list of rows; delete it and run again.")
    for number, row in enumerate(rows):
        validated(_GeneratedRow, row, f"{file}, counted from 0: row {number}", "RULER", "the generator's output")
    return rows
