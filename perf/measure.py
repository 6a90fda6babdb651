"""What the benchmarks share: timing side by side, models, and results as JSON. It knows nothing that is measured."""

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PretrainedConfig, PreTrainedModel, Qwen2Config

from pipeline.errors import PipelineError
from pipeline.models.load import load_model

# Another directory for results that are not to be kept.
RESULTS = Path(os.environ.get("PERF_RESULTS") or Path(__file__).parent / "results")
# Models of random weights: as fast as the published ones of the same sizes, and there is nothing to fetch.
RANDOM_MODELS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "smollm2-135m": (
        LlamaConfig,
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": (
        Qwen2Config,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
        },
    ),
    "phi-4": (
        Phi3Config,
        {
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "vocab_size": 100352,
            "max_position_embeddings": 16384,
            "pad_token_id": 0,
        },
    ),
    "tiny": (
        LlamaConfig,
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 256,
            "max_position_embeddings": 8192,
        },
    ),
}


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
            wait(device)
            started = time.perf_counter()
            work()
            wait(device)
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


def random_model(name: str, device: str, dtype: str = "float32", layers: int = 0) -> PreTrainedModel:
    """One of :data:`RANDOM_MODELS`, built on the device: a processor would take minutes to draw 7B weights.

    ``layers``: how many of them; 0 for all.
    """
    if name not in RANDOM_MODELS:
        raise SystemExit(f"error: no sizes are known of {name}; choose one of {', '.join(RANDOM_MODELS)}.")
    kind, sizes = RANDOM_MODELS[name]
    if layers:
        sizes = sizes | {"num_hidden_layers": layers}
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**sizes), dtype=getattr(torch, dtype))
    return model.eval()


def benchmark_model(random: str, directory: Path, device: str, dtype: str = "float32") -> PreTrainedModel:
    """A model of random weights where one is named, else the one in ``directory``."""
    return random_model(random, device, dtype) if random else model_or_exit(directory, device, dtype)


def device_name(device: str) -> str:
    """How files of results name a device: ``cpu``, or what tells one GPU from another, like ``h100``."""
    kind = torch.device(device).type
    if kind != "cuda":
        return kind
    number = re.search(r"[a-z]*\d+", torch.cuda.get_device_name(device).lower())
    return number[0] if number else kind


def write_result(name: str, device: str, content: Mapping[str, Any]) -> Path:
    """Write ``<name>-<device>.json`` to :data:`RESULTS` with what the machine is; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device_name(device)}.json"
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


def wait(device: str) -> None:
    """Until the device has done what it was given: a GPU works behind the caller's back."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
