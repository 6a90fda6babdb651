"""What the tests of eviction share: a prefill seen from its attention layers, and kvpress's view of one."""

from pathlib import Path

import torch
from kvpress import BasePress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.eviction.baselines.base import OBSERVED_QUERIES, LayerCache
from pipeline.eviction.rankers import make_rankers
from pipeline.models.attention import attention_implementation
from pipeline.models.layers import ModelLayer
from pipeline.params import check_params
from pipeline.profiles import render
from pipeline.section import parse_text

REPOSITORY = Path(__file__).parents[2]
RANKERS = make_rankers(check_params(parse_text(render("default", REPOSITORY / "profiles").params)).baselines)
# Long enough for two lags of LagKV (4 sinks + 2 x 128); no token twice in a row.
PROMPT = torch.arange(300) * 37 % 125 + 3


def layer_caches(model: PreTrainedModel, tokens: Tensor, seed: int = 0) -> list[LayerCache]:
    """Prefill ``tokens`` and return every layer as the sweep sees it, with transformers' own eager attention."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[None], past_key_values=cache)
        with attention_implementation(model, "eager"):
            attentions = model(tokens[None], output_attentions=True).attentions
    return [
        LayerCache(ModelLayer(number), layer.keys[0], layer.values[0], weights[0, :, -OBSERVED_QUERIES:].float(), seed)
        for number, (layer, weights) in enumerate(zip(cache.layers, attentions, strict=True))
    ]


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
