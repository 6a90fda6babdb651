"""The published baselines, scored by kvpress, each turned into one full ranking of a cache.

Presses are written for one compression ratio; their ``score`` is not, except StreamingLLM's, whose full
ranking (sinks, then the most recent) is spelled out here. Scores are computed in float32, whatever the cache's
dtype, random ones are drawn on the CPU. Presses that look at attention get what the model computed
(``pipeline/traces/capture.py``): kvpress itself would recompute queries, which it can for a few families only.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from kvpress import KeyDiffPress, KnormPress, LagKVPress, RandomPress, SnapKVPress, StreamingLLMPress, TOVAPress
from torch import Tensor

from pipeline.models.layers import ModelLayer

Score = Callable[["LayerCache"], Tensor]

# Attention of so many last queries is what the presses look at.
OBSERVED_QUERIES = SnapKVPress.window_size


@dataclass(frozen=True)
class LayerCache:
    """One layer at the end of a prefill of n tokens, as a press sees it.

    Attributes
    ----------
    number
        The layer's number in the model.
    keys, values
        (kv_heads, n, head_dim), keys after RoPE.
    attention
        (heads, q, n) float32: attention of the last q = min(n, OBSERVED_QUERIES) queries.
    seed
        Seed of this sample; random rankings differ between samples and layers.
    """

    number: ModelLayer
    keys: Tensor
    values: Tensor
    attention: Tensor
    seed: int


def _press(press: Any) -> Score:
    def score(cache: LayerCache) -> Tensor:
        scores: Tensor = press.score(
            # What presses ask of a module and of its input: how many heads and tokens there are.
            SimpleNamespace(config=SimpleNamespace(num_attention_heads=cache.attention.shape[0])),
            cache.keys.new_empty(1, cache.keys.shape[1], 0),
            cache.keys[None].float(),
            cache.values[None].float(),
            cache.attention[None],
            {},
        )
        return scores[0].float()

    return score


def _random(cache: LayerCache) -> Tensor:
    seed = zlib.crc32(f"{cache.seed}/{cache.number}".encode())
    shape_alone = torch.empty(1, *cache.keys.shape[:2], 0)  # on the CPU: a device must not change the ranking
    scores: Tensor = RandomPress(seed=seed).score(None, None, shape_alone, None, None, {})
    return scores[0].to(cache.keys.device)


def _streaming(cache: LayerCache) -> Tensor:
    kv_heads, tokens = cache.keys.shape[:2]
    scores = torch.arange(tokens, device=cache.keys.device, dtype=torch.float32)
    scores[: StreamingLLMPress.n_sink] = tokens  # the sinks, then the most recent tokens
    return scores.expand(kv_heads, tokens)


def _snapkv(cache: LayerCache) -> Tensor:
    # Its window of 64 queries needs tokens before it: in a short cache it is the second half.
    window = min(SnapKVPress.window_size, cache.keys.shape[1] // 2)
    return _press(SnapKVPress(window_size=window))(cache)


class _LagKV(LagKVPress):  # type: ignore[misc]  # kvpress is untyped
    """kvpress's, but for channels in which a partition has one value only: there it divides by 0."""

    def _get_states_score(self, target_v: Tensor) -> Tensor:
        reference, scored = target_v[:, :, 1:], target_v[:, :, :-1]  # (1, kv_heads, partitions, lag, head_dim)
        smallest, largest = reference.amin(-2, keepdim=True), reference.amax(-2, keepdim=True)
        flat = largest == smallest
        # Such a channel tells no tokens of the partition before it apart.
        relative = ((scored - smallest) / (largest - smallest)).masked_fill(flat, 0.0)
        return relative.std(dim=-1).softmax(dim=-1)


# A window of one query before which there is one token.
SHORTEST_CACHE = 2

# name in the results table -> (kv_heads, n) scores, higher = keep. SnapKV and TOVA see the queries of the
# last tokens, so also the question; the others do not look at attention.
BASELINES: dict[str, Score] = {
    "random": _random,
    "streaming-llm": _streaming,
    "lagkv": _press(_LagKV()),
    "keydiff": _press(KeyDiffPress()),
    "knorm": _press(KnormPress()),
    "snapkv": _snapkv,
    "tova": _press(TOVAPress()),
}
