"""Memory that decoding holds after eviction, beside the full cache: real bytes, for each budget.

For each budget it prefills 4k tokens, evicts, drops the full cache, and decodes 32 tokens. Reported are the bytes of
the evicted cache, and the peak above what is held with the weights alone, over the decoding only: resident memory of
a process of its own on a CPU, the allocator's memory on a GPU.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import DynamicCache, PreTrainedModel

from perf.measure import benchmark_model, write_result
from pipeline.evaluation.decode import EvictedCache, greedy_decode
from pipeline.eviction.budget import gather_tokens, kept_tokens, protected_ranking

NEW_TOKENS = 32


def resident(field: str) -> int:
    """Bytes that /proc says of this process: VmRSS, or its peak, VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def settle() -> None:
    """Give freed memory back to the system, and forget the peak so far."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


@torch.inference_mode()
def decode_with(model: PreTrainedModel, budget: int, length: int) -> dict[str, int]:
    """Bytes while decoding with ``budget`` of ``length`` tokens, all of them where they are equal."""
    device, on_gpu = model.device, model.device.type == "cuda"
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    model(ids[:, :8])  # what the first call leaves is no part of the cache
    settle()
    weights = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    full = DynamicCache()
    model.base_model(ids, past_key_values=full)
    states = [(layer[0][0], layer[1][0]) for layer in full]
    del full
    evicted = EvictedCache(NEW_TOKENS)
    scores = torch.rand(len(states), *states[0][0].shape[:2], generator=torch.Generator().manual_seed(1)).to(device)
    kept = kept_tokens(protected_ranking(scores, 4, 16), budget)[:, None, :, :-1]
    evicted.add_group(
        *([gather_tokens(layer[index], tokens) for layer, tokens in zip(states, kept, strict=True)] for index in (0, 1))
    )
    del states, kept
    settle()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    greedy_decode(model, evicted, ids[0, -1:].tolist(), length - 1, NEW_TOKENS, lambda _: False)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return {"cache_bytes": evicted.nbytes, "peak_bytes": peak - weights}


def main(
    model_directory: Annotated[Path, typer.Option(help="What the model stage wrote.")] = Path("models/smollm2-135m"),
    random: Annotated[str, typer.Option(help="A model of random weights instead (perf/measure.py).")] = "",
    device: str = "cpu",
    dtype: str = "float32",
    length: Annotated[int, typer.Option(help="Tokens of the context.")] = 4096,
    budgets: Annotated[str, typer.Option(help="Tokens kept, comma-separated.")] = "64,256,1024,2048,4096",
    one: Annotated[bool, typer.Option(hidden=True, help="Measure the one budget in this process.")] = False,
) -> None:
    """Measure each budget; a peak of resident memory never falls, so on a CPU in a process of its own."""
    on_gpu = torch.device(device).type == "cuda"
    model = benchmark_model(random, model_directory, device, dtype) if one or on_gpu else None
    if one:
        assert model is not None
        print(json.dumps(decode_with(model, int(budgets), length)))
        return
    found = {}
    for budget in budgets.split(","):
        if model is not None:
            found[budget] = decode_with(model, int(budget), length)
        else:
            command = [sys.executable, "-m", "perf.decode_memory", "--one", "--budgets", budget, "--random", random]
            command += ["--model-directory", str(model_directory), "--dtype", dtype, "--length", str(length)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.returncode)
            found[budget] = json.loads(done.stdout)
        print(
            f"budget {budget} of {length}: cache {found[budget]['cache_bytes'] / 1e6:.1f} MB, peak of decoding above "
            f"the weights {found[budget]['peak_bytes'] / 1e6:.1f} MB",
            flush=True,
        )
    options = {"model": random or model_directory.name, "dtype": dtype, "length": length, "new_tokens": NEW_TOKENS}
    print(write_result("decode_memory", device, {**options, "budgets": found}))


if __name__ == "__main__":
    typer.run(main)
