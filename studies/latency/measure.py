"""Wall-clock of a ranking beside the model's own work, against context length (paper, figure 6).

It times what a deployment would run: the policy over a prefilled cache and the sort, the prefill itself and
one decode step. It writes no files.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import polars as pl
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.models.layers import RankedLayer
from pipeline.models.layout import cache_layout
from pipeline.policy.agents import Policy
from pipeline.policy.ranking import rank

# The first calls allocate and choose kernels.
WARM_UP = 1


@torch.inference_mode()
def measure_latency(
    model: PreTrainedModel,
    policy: Policy,
    lengths: Sequence[int],
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> pl.DataFrame:
    """Time each piece of work at each context length.

    Parameters
    ----------
    lengths
        Tokens of the context; random token ids, since the work does not depend on them.
    repeats
        Timed calls of each, after one that is not timed.
    advance
        Called after each length.

    Returns
    -------
    pl.DataFrame
        length, work ("ranking, one layer", "ranking, all layers", "prefill", "decode step"), repeat,
        seconds.
    """
    rows: list[tuple[int, str, int, float]] = []
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        tokens = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
        cache = _prefill(model, tokens)
        states = ranked_states(model, cache)
        works: dict[str, Callable[[], object]] = {
            "ranking, one layer": partial(_rank_layer, policy, states, RankedLayer(0)),
            "ranking, all layers": partial(_rank_layers, policy, states),
            "prefill": partial(_prefill, model, tokens),
            "decode step": partial(_decode, model, tokens[:, -1:], cache),
        }
        for work, call in works.items():
            for repeat in range(-WARM_UP, repeats):
                seconds = _timed(call, model.device)
                if repeat >= 0:
                    rows.append((length, work, repeat, seconds))
        advance()
    schema = {"length": pl.Int32, "work": pl.String, "repeat": pl.Int32, "seconds": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _prefill(model: PreTrainedModel, tokens: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _decode(model: PreTrainedModel, token: Tensor, cache: DynamicCache) -> None:
    # The cache grows by a token a call; against a context of hundreds that is nothing.
    model(input_ids=token, past_key_values=cache, use_cache=True)


def ranked_states(model: PreTrainedModel, cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (kv_heads, n, head_dim) of the ranked layers, in their order."""
    layers = [cache.layers[number] for number in cache_layout(model).ranked]
    return [(layer.keys[0], layer.values[0]) for layer in layers]  # type: ignore[index]


def _rank_layer(policy: Policy, states: Sequence[tuple[Tensor, Tensor]], layer: RankedLayer) -> Tensor:
    keys, values = states[layer]
    return rank(policy(keys, values, layer=layer))


def _rank_layers(policy: Policy, states: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [_rank_layer(policy, states, RankedLayer(layer)) for layer in range(len(states))]


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    # A GPU works behind the caller's back.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
