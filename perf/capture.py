"""Trace capture against a prefill without it, and against a prefill that returns all attention weights.

All run the same model on the same tokens with an empty ``DynamicCache``: plainly (transformers' default,
``sdpa``), captured (``pipeline/traces/capture.py``), and with ``output_attentions=True``, which transformers computes
with its ``eager`` attention. The model is SmolLM2, or one of random weights (``--random``). Peak memory on a CPU is
measured in processes of its own.
"""

import argparse
import multiprocessing
import os
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from perf.measure import RANDOM_MODELS, benchmark_model, interleaved, median_ratio, write_result
from pipeline.models.attention import attention_implementation
from pipeline.traces.capture import capture_sequence

BLOCK_SIZE = 64  # of the default profile


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(input_ids=ids[None].to(model.device), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)


def capture(model: PreTrainedModel, ids: torch.Tensor, query_chunk: int) -> None:
    capture_sequence(model, ids, BLOCK_SIZE, query_chunk)


@torch.inference_mode()
def prefill_with_weights(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with attention_implementation(model, "eager"):
        model(
            input_ids=ids[None].to(model.device),
            past_key_values=DynamicCache(),
            use_cache=True,
            logits_to_keep=1,
            output_attentions=True,
        )


def works(query_chunk: int) -> dict[str, Callable[[PreTrainedModel, torch.Tensor], None]]:
    return {"plain": prefill, "capture": partial(capture, query_chunk=query_chunk), "weights": prefill_with_weights}


def peak_growth(arguments: argparse.Namespace, name: str, tokens: int) -> float:
    """MB by which one call raises the peak memory of the process that makes it, weights not counted."""
    torch.set_num_threads(arguments.threads)
    model = load(arguments)
    prefill(model, token_ids(model, 64))  # brings the weights into memory
    before = _resident_peak()
    works(arguments.query_chunk)[name](model, token_ids(model, tokens))
    return round((_resident_peak() - before) / 1e6, 1)


def peak_growth_on_gpu(model: PreTrainedModel, work: Callable[[PreTrainedModel, torch.Tensor], None], n: int) -> float:
    """The same of a GPU's memory, whose peak can be forgotten: one process is enough."""
    ids = token_ids(model, n)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    work(model, ids)
    return round((torch.cuda.max_memory_allocated(model.device) - before) / 1e6, 1)


def load(arguments: argparse.Namespace) -> PreTrainedModel:
    return benchmark_model(arguments.random, arguments.model_directory, arguments.device, arguments.dtype)


def token_ids(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    return torch.arange(tokens) % model.config.vocab_size


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """name -> tokens -> MB; on a CPU every one in a fresh process, since a peak never falls."""
    growth: dict[str, dict[str, float]] = {}
    on_gpu = torch.device(arguments.device).type == "cuda"
    model = load(arguments) if on_gpu else None
    # Makes the C library return what is freed, so that the peak is what was needed at once; read when a process starts.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    for name, work in works(arguments.query_chunk).items():
        for tokens in arguments.memory_tokens:
            if name == "weights" and tokens > arguments.weights_tokens:
                continue
            if model is not None:
                found = peak_growth_on_gpu(model, work, tokens)
            else:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    found = process.submit(peak_growth, arguments, name, tokens).result()
            growth.setdefault(name, {})[str(tokens)] = found
            print(f"peak memory, {name}, {tokens} tokens: {found:.0f} MB", flush=True)
    return growth


def measure_time(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per length: seconds of every call, and the ratios capture / plain and capture / weights."""
    model = load(arguments)
    rows = []
    for tokens in arguments.tokens:
        ids = token_ids(model, tokens)
        calls = {
            name: partial(work, model, ids)
            for name, work in works(arguments.query_chunk).items()
            if name != "weights" or tokens <= arguments.weights_tokens
        }
        seconds = interleaved(calls, arguments.repeats, arguments.device)
        row: dict[str, Any] = {"tokens": tokens, "seconds": seconds}
        for other in calls.keys() - {"capture"}:
            row[f"capture / {other}"] = ratio = median_ratio(seconds["capture"], seconds[other])
            middle, smallest, largest = ratio
            print(f"{tokens} tokens, capture / {other}: {middle:.3f} ({smallest:.3f} .. {largest:.3f})", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model-directory", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--random", default="", choices=["", *RANDOM_MODELS], help="a model of random weights instead")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--memory-tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument(
        "--weights-tokens",
        type=int,
        default=2048,
        help="how long texts are whose attention weights are returned: at 4k tokens they are 18 GB in float32",
    )
    parser.add_argument("--query-chunk", type=int, default=64, help="traces.query_chunk, of the default profile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more of them wait for each other on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory = measure_memory(arguments)
    rows = measure_time(arguments)
    options = {
        "model": arguments.random or arguments.model_directory.name,
        "dtype": arguments.dtype,
        "query_chunk": arguments.query_chunk,
        "block_size": BLOCK_SIZE,
    }
    print(write_result("capture", arguments.device, {**options, "peak_growth_mb": memory, "time": rows}))


if __name__ == "__main__":
    main()
