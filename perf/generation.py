"""A long text written with a cache that is kept to a budget, beside one that keeps everything: memory and speed.

Both caches write on from the same prompt, a segment of tokens each in turn, so that a machine that slows down does so
for both. The model has random weights, and so has its policy: neither speed nor memory depend on them. It writes a
figure of the caches' bytes and the seconds per token beside the result.
"""

import time
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from perf.measure import random_model, wait, write_result
from pipeline.eviction.cache import KVPCache
from pipeline.models.layout import cache_layout
from pipeline.policy.agents import Policy, PolicyShape
from pipeline.policy.train import TrainParams
from pipeline.section import read


@torch.inference_mode()
def write_on(model: PreTrainedModel, cache: Cache, token: Tensor, count: int) -> Tensor:
    """Add ``count`` tokens, the likeliest each time; returns the last."""
    for _ in range(count):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
    return token


def allocated(cache: Cache) -> int:
    """Bytes of a cache's tensors."""
    if isinstance(cache, KVPCache):
        return cache.nbytes
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values) if states is not None)


def draw(rows: list[dict[str, float]], budget: int) -> Figure:
    """Bytes of both caches and seconds per token, against the length of the text."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    for axes, what, scale, label in zip(
        figure.subplots(1, 2), ("bytes", "seconds"), (1e-6, 1e3), ("cache, MB", "ms per token"), strict=True
    ):
        for name, shown in (("evicted", f"KVPCache, budget {budget}"), ("full", "everything is kept")):
            axes.plot(tokens, [row[f"{name} {what}"] * scale for row in rows], label=shown)
        axes.set(xlabel="tokens of the text", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(
    device: str = "cpu",
    random: Annotated[str, typer.Option(help="Whose shapes.")] = "smollm2-135m",
    dtype: str = "float32",
    prompt: Annotated[int, typer.Option(help="Tokens that are read at once.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens that are written.")] = 4000,
    segment: Annotated[int, typer.Option(help="Tokens of a turn.")] = 100,
    budget: int = 256,
    slack: int = 64,
    name: Annotated[str, typer.Option(help="Of the result's file.")] = "generation",
) -> None:
    """Write on with both caches in turns."""
    model = random_model(random, device, dtype)
    layout = cache_layout(model)
    agent = read("train", TrainParams).agent
    shape = PolicyShape(len(layout.ranked), layout.kv_heads, layout.head_dim, agent)
    policy = Policy(shape, torch.Generator().manual_seed(0)).to(device)
    caches: dict[str, Cache] = {"evicted": KVPCache(policy, budget, slack=slack), "full": DynamicCache()}
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    last = {}
    with torch.inference_mode():
        for kind, cache in caches.items():
            last[kind] = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    rows: list[dict[str, float]] = []
    for done in range(segment, tokens + 1, segment):
        row: dict[str, float] = {"tokens": prompt + done}
        for kind, cache in caches.items():
            wait(device)
            started = time.perf_counter()
            last[kind] = write_on(model, cache, last[kind], segment)
            wait(device)
            row |= {f"{kind} seconds": (time.perf_counter() - started) / segment, f"{kind} bytes": allocated(cache)}
        rows.append(row)
    seconds = {kind: sum(row[f"{kind} seconds"] for row in rows) * segment for kind in caches}
    bytes_held = [row["evicted bytes"] for row in rows]
    most = (budget + slack) * layout.kv_heads * len(layout.ranked) * (2 * layout.head_dim * model.dtype.itemsize + 8)
    print(
        f"{tokens} tokens behind {prompt}: {tokens / seconds['evicted']:.1f} per second with a budget of {budget}, "
        f"{tokens / seconds['full']:.1f} with everything, ratio {seconds['full'] / seconds['evicted']:.2f}; "
        f"cache {min(bytes_held) / 1e6:.1f} to {max(bytes_held) / 1e6:.1f} MB (budget and slack are {most / 1e6:.1f}), "
        f"and {rows[-1]['full bytes'] / 1e6:.1f} with everything"
    )
    path = write_result(name, device, {"budget": budget, "slack": slack, "seconds": seconds, "rows": rows})
    draw(rows, budget).savefig(path.with_suffix(".png"), dpi=130)
    print(path)


if __name__ == "__main__":
    typer.run(main)
