"""What a press of kvpress says of a cache.

Presses are written for one compression ratio; their ``score`` is not. Scores are computed in float32, whatever the
cache's dtype. Presses that look at attention get what the model computed (``pipeline/traces/capture.py``): kvpress
itself would recompute queries, which it can for a few families only.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from pipeline.eviction.baselines.base import LayerCache


def press_scores(press: Any, cache: LayerCache) -> Tensor:
    """(kv_heads, n) float32, higher = keep."""
    heads = cache.keys.shape[0] if cache.attention is None else cache.attention.shape[0]
    scores: Tensor = press.score(
        # What presses ask of a module and of its input: how many heads and tokens there are.
        SimpleNamespace(config=SimpleNamespace(num_attention_heads=heads)),
        cache.keys.new_empty(1, cache.keys.shape[1], 0),
        cache.keys[None].float(),
        cache.values[None].float(),
        None if cache.attention is None else cache.attention[None],
        {},
    )
    return scores[0].float()
