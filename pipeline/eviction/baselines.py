"""The published baselines, scored by kvpress, each turned into one full ranking of a cache.

Presses are written for one compression ratio; their ``score`` is not, except StreamingLLM's, whose full
ranking (sinks, then the most recent) is spelled out here. Scores are computed in float32.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import KeyDiffPress, KnormPress, LagKVPress, RandomPress, SnapKVPress, StreamingLLMPress, TOVAPress
from torch import Tensor, nn

Score = Callable[["LayerCache"], Tensor]


@dataclass(frozen=True)
class LayerCache:
    """One layer at the end of a prefill of n tokens, as a press sees it.

    Attributes
    ----------
    module
        The attention module.
    hidden_states
        (1, n, hidden), the module's input.
    keys, values
        (1, kv_heads, n, head_dim), keys after RoPE.
    kwargs
        The module's keyword arguments, of which presses read ``position_embeddings``.
    seed
        Seed of this sample; random rankings differ between samples and layers.
    """

    module: nn.Module
    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    kwargs: dict[str, Any]
    seed: int

    def prefix(self, cache_size: int) -> "LayerCache":
        """The same layer as it stood after ``cache_size`` tokens (attention is causal)."""
        cos, sin = self.kwargs["position_embeddings"]
        return LayerCache(
            self.module,
            self.hidden_states[:, :cache_size],
            self.keys[:, :, :cache_size],
            self.values[:, :, :cache_size],
            self.kwargs | {"position_embeddings": (cos[:, :cache_size], sin[:, :cache_size])},
            self.seed,
        )


def _press(press: Any) -> Score:
    def score(cache: LayerCache) -> Tensor:
        scores: Tensor = press.score(cache.module, cache.hidden_states, cache.keys, cache.values, None, cache.kwargs)
        return scores[0].float()

    return score


def _random(cache: LayerCache) -> Tensor:
    layer = int(cache.module.layer_idx)  # type: ignore[arg-type]  # every attention module carries its index
    seed = zlib.crc32(f"{cache.seed}/{layer}".encode())
    scores: Tensor = RandomPress(seed=seed).score(
        cache.module, cache.hidden_states, cache.keys, cache.values, None, cache.kwargs
    )
    return scores[0].float()


def _streaming(cache: LayerCache) -> Tensor:
    kv_heads, tokens = cache.keys.shape[1:3]
    scores = torch.arange(tokens, device=cache.keys.device, dtype=torch.float32)
    scores[: StreamingLLMPress.n_sink] = tokens  # the sinks, then the most recent tokens
    return scores.expand(kv_heads, tokens)


def _snapkv(cache: LayerCache) -> Tensor:
    # Its window of 64 queries needs tokens before it: in a short cache it is the second half.
    window = min(SnapKVPress.window_size, cache.keys.shape[2] // 2)
    return _press(SnapKVPress(window_size=window))(cache)


# A window of one query before which there is one token.
SHORTEST_CACHE = 2

# name in the results table -> (kv_heads, n) scores, higher = keep. SnapKV and TOVA see the queries of the
# last tokens, so also the question; the others do not look at attention.
BASELINES: dict[str, Score] = {
    "random": _random,
    "streaming-llm": _streaming,
    "lagkv": _press(LagKVPress()),
    "keydiff": _press(KeyDiffPress()),
    "knorm": _press(KnormPress()),
    "snapkv": _snapkv,
    "tova": _press(TOVAPress()),
}
