"""What the tests of eviction share: a prefill seen from its attention layers, and kvpress's view of one."""

from typing import Any

import torch
from kvpress import BasePress
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pipeline.eviction.baselines import LayerCache

# Long enough for two lags of LagKV (4 sinks + 2 x 128); no token twice in a row.
PROMPT = torch.arange(300) * 37 % 125 + 3


def layer_caches(model: PreTrainedModel, tokens: Tensor, seed: int = 0) -> list[LayerCache]:
    """Prefill ``tokens`` and return every layer as the sweep's hook sees it."""
    found: list[LayerCache] = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        stored = kwargs["past_key_values"].layers[module.layer_idx]
        found.append(LayerCache(module, kwargs["hidden_states"], stored.keys, stored.values, kwargs, seed))

    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.base_model.layers]
    with torch.no_grad():
        model(tokens[None], past_key_values=DynamicCache(config=model.config))
    for handle in handles:
        handle.remove()
    return found


def compressed(model: PreTrainedModel, tokens: Tensor, press: BasePress) -> DynamicCache:
    """The cache that kvpress leaves after a prefill."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), press(model):
        model(tokens[None], past_key_values=cache)
    return cache


def token_indices(some: Tensor, all_keys: Tensor) -> Tensor:
    """Which tokens the key vectors ``some`` (kv_heads, b, head_dim) belong to: (kv_heads, b), ascending."""
    equal = (some[:, :, None] == all_keys[:, None]).all(-1)  # (kv_heads, b, n)
    assert (equal.sum(-1) == 1).all(), "two tokens of a head have equal keys"
    return equal.int().argmax(-1).sort(-1).values
