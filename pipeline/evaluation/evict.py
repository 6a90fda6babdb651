"""From rankings to one cache that holds every (policy, budget) pair. It knows no policies and no model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.evaluation.decode import EvictedCache
from pipeline.evaluation.prefill import Prefill
from pipeline.evaluation.sliding import SlidingLayer
from pipeline.eviction.budget import gather_tokens, kept_tokens
from pipeline.models.layers import ModelLayer
from pipeline.tables import FULL, PolicyKey

Rows = list[tuple[PolicyKey, int | None]]


def evict(
    prefill: Prefill,
    rankings: Mapping[PolicyKey, Tensor],
    budgets: Sequence[int],
    windows: Mapping[ModelLayer, int],
    reserve: int,
) -> tuple[EvictedCache, Rows]:
    """Build the cache of all pairs that evict anything, and of the uncompressed model; returns the pair of each row.

    The last context token counts towards the budget, but is left out: it is fed again.

    Parameters
    ----------
    rankings
        (layers, kv_heads, n), best first, protected tokens in front.
    windows
        Number of a sliding layer -> its window.
    reserve
        Tokens that each row may grow by.
    """
    n = prefill.keys[0].shape[2]
    sliding = {layer: SlidingLayer(windows[layer], *states) for layer, states in prefill.windows.items()}
    cache = EvictedCache(reserve, sliding)
    rows: Rows = []
    for budget in (budget for budget in budgets if budget < n):
        # Sorted by position, and the last token is protected: it comes last.
        kept = {key: kept_tokens(ranking, budget)[..., :-1] for key, ranking in rankings.items()}
        # index: (policies, kv_heads, budget - 1) per layer
        by_layer = torch.stack(list(kept.values()), dim=1)
        groups = [
            [gather_tokens(layer[0], index) for layer, index in zip(states, by_layer, strict=True)]
            for states in (prefill.keys, prefill.values)
        ]
        cache.add_group(*groups)
        rows += [(key, budget) for key in kept]
    cache.add_group(*([layer[:, :, :-1] for layer in states] for states in (prefill.keys, prefill.values)))
    rows.append((FULL, None))
    return cache, rows
