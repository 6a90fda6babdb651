"""What the benchmarks share: timing side by side, and results as JSON. It knows nothing that is measured."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.models import load_model

RESULTS = Path(__file__).parent / "results"


def interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call of each piece of work.

    The pieces take turns, so that a machine that slows down or is shared for a while does so for all of them;
    ratios of such a run mean something where single times do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(-warm_up, repeats):
        for name, work in works.items():
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of the ratios of calls made in the same turn."""
    ratios = [first / second for first, second in zip(numerator, denominator, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def model_or_exit(directory: Path, device: str, dtype: str = "float32") -> PreTrainedModel:
    """Load the model of a benchmark; where there is none, end with one sentence that says how to make it."""
    try:
        return load_model(directory, dtype, device)
    except PipelineError as error:
        raise SystemExit(f"error: {error} 'dvc repro model@smollm2-135m' makes the default one.") from None


def write_result(name: str, device: str, content: Mapping[str, Any]) -> Path:
    """Write ``perf/results/<name>-<kind of device>.json`` with what the machine is; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{torch.device(device).type}.json"
    path.write_text(json.dumps({"machine": _machine(device), **content}, indent=2) + "\n")
    return path


def _machine(device: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
