"""What a model's cache looks like, asked of the model itself: it is run on a few tokens, and watched.

Heads, widths and layers are those that its attention modules hand over; which tokens a layer sees is said by the
mask that the model builds, evaluated at positions as far apart as the model reads. Nothing is taken from a list of
names. It knows no capture and no eviction.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from pipeline.errors import PipelineError, one_line
from pipeline.models.attention import attention_function, call_active, own_attention
from pipeline.models.forward import run_model
from pipeline.models.layers import ModelLayer, layer_number, readable_tokens

_NAME = "kvp_layout"
_TOKENS = 3
# Where a config names no length, masks are looked at as far as this.
_FAR = 1 << 17


@dataclass(frozen=True)
class CacheLayout:
    """The layers of a model's cache.

    Attributes
    ----------
    ranked
        Numbers of the layers that attend to the whole context: the ones that are captured, ranked and evicted.
        Everything kept per layer (records, agents, rankings, costs) is in this order.
    windows
        Number of a layer that slides over a window -> tokens that a query sees there, itself included. Such a cache
        does not grow with the context, so a ranking over all tokens means nothing there.
    heads, kv_heads, head_dim
        Of every layer.
    tokens
        Length of the longest text that the model was made for, up to which all of this holds; None where its config
        does not say.
    modules
        The attention module of each layer.
    """

    ranked: tuple[ModelLayer, ...]
    windows: Mapping[ModelLayer, int]
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int | None
    modules: Mapping[ModelLayer, nn.Module]


@dataclass(frozen=True)
class _Layer:
    module: nn.Module
    sizes: tuple[int, int, int, int]  # heads, kv_heads, width of a key, width of a value
    mask: object


def _mask(*, mask_function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """What a model would build its mask from: (batch, head, query, token), index tensors that broadcast -> bool."""
    return mask_function


# The attention that is active is called under this name too, but with what the model's mask is made of.
AttentionInterface.register(_NAME, call_active)
AttentionMaskInterface.register(_NAME, _mask)


_known: WeakKeyDictionary[PreTrainedModel, CacheLayout] = WeakKeyDictionary()


def cache_layout(model: PreTrainedModel) -> CacheLayout:
    """Look at a model's cache, once for each model.

    Raises
    ------
    PipelineError
        The model keeps something else than keys and values, shares them between layers, has layers of different
        shapes, or masks that are neither causal nor a window, or none of its layers attends to the whole context.
    """
    if model not in _known:
        _known[model] = _look(model)
    return _known[model]


def _look(model: PreTrainedModel) -> CacheLayout:
    name = model.name_or_path or type(model).__name__
    seen: dict[ModelLayer, _Layer] = {}
    calls = 0

    def watch(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        nonlocal calls
        calls += 1
        sizes = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        seen[layer_number(module)] = _Layer(module, sizes, attention_mask)
        # What comes out is of no interest: sizes and masks do not depend on it.
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    cache = DynamicCache()
    try:
        with attention_function(model, watch, _NAME):
            run_model(model, torch.zeros(1, _TOKENS, dtype=torch.int64), cache, 0, 1)
    except PipelineError:
        raise
    except Exception as error:  # a family's own code: any class
        raise PipelineError(
            f"{name} cannot be run with a cache of keys and values alone ({one_line(error)}); choose another model."
        ) from error
    if not seen:
        raise own_attention(model)
    if problem := _problem(seen, calls, cache):
        raise PipelineError(f"{name} {problem}, so its cache cannot be ranked; choose another model.")
    tokens = _tokens(name, model)
    windows = {number: _window(name, number, layer.mask, tokens or _FAR) for number, layer in sorted(seen.items())}
    ranked = tuple(number for number, window in windows.items() if window is None)
    if not ranked:
        raise PipelineError(
            f"{name} has no layer that attends to the whole context: all slide over a window of "
            f"{min(window for window in windows.values() if window)} tokens, so there is nothing to evict; choose "
            "another model."
        )
    heads, kv_heads, head_dim, _ = seen[ranked[0]].sizes
    return CacheLayout(
        ranked,
        {number: window for number, window in windows.items() if window is not None},
        heads,
        kv_heads,
        head_dim,
        tokens,
        {number: layer.module for number, layer in sorted(seen.items())},
    )


def _problem(seen: Mapping[ModelLayer, _Layer], calls: int, cache: DynamicCache) -> str:
    """Why a cache is none of one key and one value per token, KV head and layer; empty if it is."""
    holding = {
        ModelLayer(number)
        for number, layer in enumerate(cache.layers)
        if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.shape[2] == _TOKENS  # type: ignore[union-attr]
    }
    if calls != len(seen):
        return f"has {calls} attentions in {len(seen)} numbered layers"
    if without := sorted(set(seen) ^ holding) or sorted(set(map(ModelLayer, range(len(cache.layers)))) - holding):
        return f"keeps no keys and values of its own in layer {', '.join(map(str, without))}"
    shapes = {layer.sizes for layer in seen.values()}
    if len(shapes) > 1:
        return "has layers with different numbers of heads or different widths"
    heads, kv_heads, key, value = shapes.pop()
    if heads % kv_heads:
        return f"has {heads} query heads for {kv_heads} KV heads"
    if key != value:
        return f"has keys of {key} and values of {value} numbers, where an agent takes equal ones"
    for number in seen:
        stored = cache.layers[number].keys
        if stored is None or stored.shape[1:] != (kv_heads, _TOKENS, key):
            return f"keeps in layer {number} something else than what its attention reads"
    return ""


def _tokens(name: str, model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    try:
        return readable_tokens(lambda key: getattr(config, key, None))
    except ValueError as error:
        raise PipelineError(f"{name}: its config.json does not say how many tokens it reads ({error}).") from None


def _window(name: str, number: ModelLayer, mask: object, reach: int) -> int | None:
    """How many tokens a query of this layer sees, None if all before it, up to ``reach``."""
    refused = PipelineError(
        f"{name} masks its layer {number} in a way that is neither causal nor a window over the last tokens, so its "
        "cache cannot be ranked; choose another model."
    )
    if mask is None:  # plain causal attention, which needs no mask
        return None
    if not callable(mask):
        raise refused
    tokens = torch.arange(reach)
    zero = torch.zeros((), dtype=torch.int64)
    counts = {}
    # The last two tell a window from chunks whose borders stay where they are.
    for query in sorted({0, min(1, reach - 1), reach // 3, reach // 2, max(reach - 2, 0), reach - 1}):
        try:
            visible = torch.as_tensor(mask(zero, zero, torch.tensor(query), tokens)).broadcast_to(reach)
        except Exception:  # a mask that asks for more than positions
            raise refused from None
        count = int(visible.sum())
        if not bool(visible[query + 1 - count : query + 1].all()):
            raise refused
        counts[query] = count
    window = max(counts.values())
    if any(count != min(query + 1, window) for query, count in counts.items()):
        raise refused
    return None if window >= reach else window
