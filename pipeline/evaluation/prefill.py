"""One prefill of one context: what every policy and baseline says of it, and what truly mattered.

Policies are asked for their scores while the prompt is prefilled. Layers that slide over a window are not ranked: they
hold what they hold in a plain run. "Layers" below are the others, in the order of ``pipeline/models/layout.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.eviction.baselines.base import OBSERVED_QUERIES, SHORTEST_CACHE, LayerCache
from pipeline.eviction.rankers import Ranker
from pipeline.models.forward import require_finite
from pipeline.models.layers import ModelLayer, RankedLayer
from pipeline.models.layout import cache_layout
from pipeline.policy.agents import Policy
from pipeline.samples.sample import Sample
from pipeline.tables import ORACLE, PolicyKey
from pipeline.traces.capture import ObservedLayer, Tails, run_captured


@dataclass(frozen=True)
class Prefill:
    """One prefilled context of n tokens, and what followed it.

    Attributes
    ----------
    keys, values
        Per layer (1, kv_heads, n, head_dim): the whole cache.
    scores
        cache size -> policy -> (layers, kv_heads, cache size) float32, higher = keep.
    importance
        cache size -> (layers, kv_heads, cache size) float32, true future importance.
    windows
        Number of a sliding layer -> keys and values, (kv_heads, window - 1, head_dim) or fewer: what it holds
        when the last prompt token comes.
    """

    keys: list[Tensor]
    values: list[Tensor]
    scores: dict[int, dict[PolicyKey, Tensor]]
    importance: dict[int, Tensor]
    windows: dict[ModelLayer, tuple[Tensor, Tensor]]


def prefill_sample(
    model: PreTrainedModel,
    sample: Sample,
    policies: Mapping[PolicyKey, Policy],
    rankers: Mapping[str, Ranker],
    seed: int,
    ranked: bool = True,
) -> Prefill:
    """Prefill a context once, score it with every policy and baseline, and look at what followed.

    They score it at a second cache size too, the middle, where there is something to rank.

    Parameters
    ----------
    policies
        On the model's device.
    seed
        Of this sample, for random rankings.
    ranked
        Whether anything is scored at all.

    Raises
    ------
    PipelineError
        A score, a key, a value or a logit is not finite.
    """
    layout = cache_layout(model)
    n = sample.context_len
    ids = torch.tensor(sample.input_ids)
    cache = DynamicCache()
    sizes = tuple(size for size in (n // 2, n) if size >= SHORTEST_CACHE and ranked)
    collected: dict[int, dict[PolicyKey, list[Tensor]]] = {size: {} for size in sizes}

    def score(index: RankedLayer, layer: ObservedLayer) -> None:
        for size, by_key in collected.items():
            keys, values = layer.keys[:, :size], layer.values[:, :size]  # attention is causal
            found = {key: policy(keys, values, layer=index) for key, policy in policies.items()}
            view = LayerCache(layer.number, keys, values, layer.tails[size], seed)
            found |= {PolicyKey(name): ranker(view) for name, ranker in rankers.items()}
            for key, scores in found.items():
                by_key.setdefault(key, []).append(scores)

    tails = Tails(sizes, OBSERVED_QUERIES)
    within = run_captured(model, ids[:n], cache, sizes, tails, score)
    # The true continuation runs against the uncompressed cache; its attention is the oracle's knowledge.
    beyond = run_captured(model, ids[n:], cache, sizes)
    importance = {size: within[size] + beyond[size] for size in sizes}
    scores = {size: {key: torch.stack(layers) for key, layers in by_key.items()} for size, by_key in collected.items()}
    for size, by_policy in scores.items():
        by_policy[ORACLE] = importance[size]
        for key, found in by_policy.items():
            require_finite(model, found, f"sample {sample.sample_id}: a score of {key.policy}")
    states = [(layer[0], layer[1]) for layer in cache]  # (1, kv_heads, tokens, head_dim)
    keys, values = ([states[layer][index][:, :, :n] for layer in layout.ranked] for index in (0, 1))
    windows = {}
    for layer, window in layout.windows.items():
        held = slice(max(0, n - window), n - 1)
        windows[layer] = (states[layer][0][0, :, held], states[layer][1][0, :, held])
    return Prefill(keys, values, scores, importance, windows)
