"""Capture of a training sequence against a prefill without it, and what it holds in memory.

Both run the same model on the same tokens with an empty ``DynamicCache``: plainly (transformers' default, ``sdpa``),
and captured at the cuts of the default profile (``pipeline/traces/capture.py``), means over several draws of them, and
at the smallest cut, where the attention of every query is looked at. The model has random weights. Peak memory on a
CPU is measured in processes of its own, with one layer of the model; less the cache it must grow with the tokens.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from perf.expected_cost import peak_bytes
from perf.measure import RANDOM_MODELS, interleaved, median_ratio, random_model, write_result
from pipeline.section import read
from pipeline.traces.capture import run_captured
from pipeline.traces.params import SMALLEST_CUT, TracesParams, training_cuts

DRAWS = 4  # of cuts


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(input_ids=ids[None].to(model.device), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)


def drawn_cuts(tokens: int) -> list[tuple[int, ...]]:
    params = read("traces", TracesParams)
    return [training_cuts(tokens, tokens * 15 // 16, f"sample {draw}", params) for draw in range(DRAWS)]


def capture(model: PreTrainedModel, ids: torch.Tensor, draws: list[tuple[int, ...]]) -> None:
    for cuts in draws:
        run_captured(model, ids, DynamicCache(), cuts)


def works(tokens: int) -> dict[str, Callable[[PreTrainedModel, torch.Tensor], None]]:
    """Each as often as there are draws."""
    return {
        "plain": lambda model, ids: [prefill(model, ids) for _ in range(DRAWS)] and None,
        "capture": partial(capture, draws=drawn_cuts(tokens)),
        "capture of all": partial(capture, draws=[(SMALLEST_CUT,)] * DRAWS),
    }


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * tokens * model.dtype.itemsize


def peak_growth(arguments: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Bytes by which one capture raises the peak memory of its process, weights not counted; and of the cache."""
    torch.set_num_threads(arguments.threads)
    model = random_model(arguments.random, arguments.device, arguments.dtype, layers=1)
    prefill(model, token_ids(model, 64))  # brings the weights into memory
    ids, cuts = token_ids(model, tokens), (tokens // 2, SMALLEST_CUT)
    peak = peak_bytes(lambda: run_captured(model, ids, DynamicCache(), cuts), arguments.device)
    return {"peak": peak, "cache": cache_bytes(model, tokens)}


def token_ids(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    return torch.arange(tokens) % model.config.vocab_size


def measure_memory(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """tokens -> bytes; every one in a fresh process, since a peak never falls."""
    growth = {}
    # Makes the C library return what is freed, so that the peak is what was needed at once; read when a process starts.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    for tokens in arguments.memory_tokens:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            growth[str(tokens)] = row = process.submit(peak_growth, arguments, tokens).result()
        beyond = (row["peak"] - row["cache"]) / tokens
        print(
            f"one layer, {tokens} tokens: {row['peak'] / 1e6:.1f} MB, of which {row['cache'] / 1e6:.1f} MB of cache; "
            f"{beyond:.0f} bytes per token besides",
            flush=True,
        )
    return growth


def measure_time(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per length: seconds of every call, and the ratios to a plain prefill."""
    model = random_model(arguments.random, arguments.device, arguments.dtype, arguments.layers)
    rows = []
    for tokens in arguments.tokens:
        calls = {name: partial(work, model, token_ids(model, tokens)) for name, work in works(tokens).items()}
        seconds = interleaved(calls, arguments.repeats, arguments.device)
        row: dict[str, Any] = {"tokens": tokens, "cuts": drawn_cuts(tokens), "seconds": seconds}
        for name in ("capture", "capture of all"):
            row[f"{name} / plain"] = ratio = median_ratio(seconds[name], seconds["plain"])
            middle, smallest, largest = ratio
            print(f"{tokens} tokens, {name} / plain: {middle:.3f} ({smallest:.3f} .. {largest:.3f})", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random", default="smollm2-135m", choices=RANDOM_MODELS, help="whose shapes")
    parser.add_argument("--layers", type=int, default=3, help="of the timed model; 0 for all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--memory-tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more of them wait for each other on a busy machine")
    parser.add_argument("--name", default="capture", help="of the result's file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory = measure_memory(arguments)
    rows = measure_time(arguments)
    options = {"model": arguments.random, "layers": arguments.layers or "all", "dtype": arguments.dtype}
    content = {**options, "peak_growth_of_one_layer": memory, "time": rows}
    print(write_result(arguments.name, arguments.device, content))


if __name__ == "__main__":
    main()
