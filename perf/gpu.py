"""Everything that a GPU must show, in one go: the checks of tests/test_gpu.py, then each benchmark on the GPU.

    python -m perf.gpu
    python -m perf.gpu --tiny          (the same on a CPU, as small as can be; results are thrown away)

The most important come first, each a process of its own with a limit of time: what fails or takes too long stops
nothing else. Models have random weights, so nothing is fetched. The output of each step is kept beside its result.
Without a GPU there is nothing to do, and it says so.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perf.measure import RESULTS, device_name, write_result


@dataclass(frozen=True)
class Step:
    """One process: a module's arguments on a GPU, in a run with --tiny, and the seconds that it may take."""

    name: str
    module: str
    arguments: str
    tiny: str
    limit: int


# What --tiny runs takes the same way through the code at sizes that mean nothing.
STEPS = (
    Step(
        "checks",
        "pytest",
        "-q -m gpu -W default -p no:cacheprovider tests/test_gpu.py",
        "-q -p no:cacheprovider tests/test_gpu.py -k kept_keys",
        120,
    ),
    Step("rates", "perf.rates", "", "--random tiny --tokens 64 --numbers 65536 --sequences 1 --repeats 1", 45),
    Step(
        "capture",
        "perf.capture",
        "--random qwen2.5-7b --layers 0 --dtype bfloat16 --tokens 1024 4096 8192",
        "--random tiny --repeats 1 --tokens 128 --memory-tokens 128",
        90,
    ),
    Step(
        "capture_phi4",
        "perf.capture",
        "--random phi-4 --layers 10 --dtype bfloat16 --tokens 4096 --memory-tokens 4096 --name capture_phi4",
        "--random tiny --repeats 1 --tokens 64 --memory-tokens 64 --name capture_phi4",
        60,
    ),
    Step("training_step", "perf.training_step", "--repeats 7", "--tokens 16 --examples 1 --repeats 1", 60),
    Step("paper_training", "perf.paper_training", "", "--steps 1 --kept 8", 45),
    Step("paper_training_rloo", "perf.paper_training", "--estimator rloo", "--steps 1 --kept 8 --estimator rloo", 45),
    Step(
        "sweep",
        "perf.sweep",
        "--random qwen2.5-7b --dtype bfloat16 --lengths 4096 --turns 1",
        "--random tiny --lengths 520 --turns 1",
        90,
    ),
    Step(
        "ranking",
        "perf.ranking",
        "--random qwen2.5-7b --only-model --lengths 1024,4096,16384 --repeats 5",
        "--random tiny --only-model --lengths 128 --repeats 1",
        45,
    ),
    Step(
        "decode_memory",
        "perf.decode_memory",
        "--random qwen2.5-7b --dtype bfloat16 --budgets 64,256,1024,2048,4096",
        "--random tiny --length 256 --budgets 64,256",
        45,
    ),
    Step("check", "perf.check", "--random qwen2.5-7b", "--random tiny", 45),
    Step("expected_cost", "perf.expected_cost", "", "--tokens 1024", 30),
    Step("trace_reading", "perf.trace_reading", "--repeats 3", "--layers 1 --sequences 4 --repeats 1 --steps 4", 30),
)


def run(step: Step, device: str, tiny: bool, results: Path, limit: float) -> tuple[str, float]:
    """Run one step; returns how it ended and its seconds. Its output goes to a file and to the terminal."""
    command = [sys.executable, "-m", step.module, *(step.tiny if tiny else step.arguments).split()]
    if step.module != "pytest":
        command += ["--device", device]
    started = time.perf_counter()
    log = results / f"{step.name}-{device_name(device)}.log"
    environment = os.environ | {"PERF_RESULTS": str(results), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            ending = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ending = f"stopped after {limit:.0f} s"
    print(log.read_text().rstrip(), flush=True)
    return ending, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with the smallest sizes")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], default=[], metavar="STEP")
    parser.add_argument("--seconds", type=float, default=480, help="that all steps may take together")
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else arguments.device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("This machine has no GPU that torch can use: nothing to measure. --tiny runs the steps on the CPU.")
        return
    chosen = [step for step in STEPS if not arguments.only or step.name in arguments.only]
    ends = time.perf_counter() + arguments.seconds
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        results = Path(stack.enter_context(tempfile.TemporaryDirectory())) if arguments.tiny else RESULTS
        results.mkdir(exist_ok=True)
        for step in chosen:
            left = ends - time.perf_counter()
            if left < 5:
                ending, seconds = "left out, no time left", 0.0
            else:
                # A shared processor may take longer than a GPU of one's own.
                limit = left if arguments.tiny else min(step.limit, left)
                ending, seconds = run(step, device, arguments.tiny, results, limit)
            rows.append({"step": step.name, "ending": ending, "seconds": round(seconds, 1)})
            print(f"== {step.name}: {ending}, {seconds:.1f} s", flush=True)
        if not arguments.tiny:
            print(write_result("gpu", device, {"steps": rows}))
    for row in rows:
        print(f"{row['step']:20s} {row['seconds']:6.1f} s  {row['ending']}")
    if any(row["ending"] != "done" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
