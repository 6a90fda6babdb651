"""The rates that the plan of a run goes by (``pipeline/planning/devices.py``), measured on this machine.

    python -m perf.rates

Products of matrices are those of a prefill of a few layers in each dtype; ``memory`` is a
softmax of what fits no cache, read and written once; ``kernel`` is a step of decoding, whose time is that of starting
its operations. Trace files are written and read for the first time, checksums included, by one process; ``commit`` is
a file hashed and copied. ``python -m stages.plan`` takes the results in place of its estimates.
"""

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from perf.capture import prefill, token_ids
from perf.measure import RANDOM_MODELS, interleaved, random_model, wait, write_result
from perf.trace_reading import read_all
from perf.trace_size import SMOLLM2, finish, write_examples
from pipeline.planning.counts import LAYER_KERNELS, capture_work
from pipeline.planning.shapes import ModelShape
from pipeline.section import read
from pipeline.traces.params import TracesParams
from pipeline.traces.shards import ExampleReader

DTYPES = ("float32", "bfloat16", "float16")


def best(work: Callable[[], object], device: str, repeats: int) -> float:
    return min(interleaved({"work": work}, repeats, device)["work"])


def shape_of(model: PreTrainedModel) -> ModelShape:
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    sizes = (layers, layers, heads, config.num_key_value_heads, config.hidden_size // heads)
    return ModelShape(*sizes, config.hidden_size, config.intermediate_size, config.vocab_size)


def product_rate(model: PreTrainedModel, tokens: int, device: str, repeats: int) -> float:
    """FLOP/s of a prefill, the time of its other operations included."""
    accelerator = torch.device(device).type != "cpu"
    flops = capture_work(shape_of(model), tokens, model.dtype.itemsize, 0, accelerator).flops
    return flops / best(lambda: prefill(model, token_ids(model, tokens)), device, repeats)


@torch.inference_mode()
def kernel_seconds(model: PreTrainedModel, device: str, repeats: int) -> float:
    """Seconds for each operation of a step of decoding of one row."""
    cache = DynamicCache()
    ids = token_ids(model, 64)[None].to(model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)

    def step() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    return best(step, device, repeats) / (model.config.num_hidden_layers * LAYER_KERNELS)


def file_rates(sequences: int, repeats: int) -> dict[str, float]:
    """Bytes/s at which traces are written, and read for the first time, and a file is hashed and copied."""
    params, layers = read("traces", TracesParams), 4
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "traces"
        started = time.perf_counter()
        size = write_examples(root, SMOLLM2, layers, sequences, params)
        written = time.perf_counter() - started
        finish(root, SMOLLM2, layers, {"train": 1})
        reading = best(lambda: read_all(ExampleReader(root, "train", 0)), "cpu", repeats)
        source, copy = Path(directory) / "source", Path(directory) / "copy"
        source.write_bytes(bytes(size))

        def commit() -> None:
            with source.open("rb") as file:
                hashlib.file_digest(file, "md5")
            shutil.copyfile(source, copy)

        committing = best(commit, "cpu", repeats)
    return {"write": size / written, "read": size / reading, "commit": size / committing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random", choices=RANDOM_MODELS, help="whose shapes; those of the profiles by default")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=0, help="of a prefill; by default 4,096 on a GPU, 1,024 on a CPU")
    parser.add_argument("--numbers", type=int, default=1 << 26, help="of the softmax")
    parser.add_argument("--sequences", type=int, default=24, help="of trace files")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    on_cpu = torch.device(device).type == "cpu"
    shapes = arguments.random or ("smollm2-135m" if on_cpu else "qwen2.5-7b")
    tokens = arguments.tokens or (1024 if on_cpu else 4096)
    rates: dict[str, float] = {}
    for dtype in DTYPES:
        model = random_model(shapes, device, dtype, arguments.layers)
        rates[f"flops.{dtype}"] = product_rate(model, tokens, device, repeats)
    numbers = torch.rand(arguments.numbers // 1024, 1024, device=device)
    out = torch.empty_like(numbers)
    rates["memory"] = 2 * numbers.nbytes / best(lambda: torch.softmax(numbers, -1, out=out), device, repeats)
    small = random_model("tiny", device, "float32")
    rates["kernel"] = kernel_seconds(small, device, 20)
    wait(device)
    rates |= file_rates(arguments.sequences, repeats)
    for name, rate in rates.items():
        print(f"{name}: {rate:.3g}")
    options = {"model": shapes, "layers": arguments.layers, "tokens": tokens}
    print(write_result("rates", device, {**options, "rates": rates}))


if __name__ == "__main__":
    main()
