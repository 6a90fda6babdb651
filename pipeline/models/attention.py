"""Run a model with another attention function, and the softmax that such functions share.

Transformers hands every attention module's queries, keys and values to the function that its config names. Ours is
registered once and calls whatever is active, so that a function may carry its own state and nothing has to travel
through a model's keyword arguments, which some families do not pass on. It knows no capture and no eviction.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from pipeline.errors import PipelineError

# (module, query, key, value, attention_mask, **kwargs) -> (output (rows, t, heads, head_dim), None)
AttentionFunction = Callable[..., tuple[Tensor, None]]

NAME = "kvp"
_active: ContextVar[AttentionFunction] = ContextVar("attention function")


def call_active(module: torch.nn.Module, *arguments: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers: whatever is active."""
    return _active.get()(module, *arguments, **kwargs)


AttentionInterface.register(NAME, call_active)


@contextmanager
def attention_function(model: PreTrainedModel, function: AttentionFunction, name: str = NAME) -> Iterator[None]:
    """Run ``model`` with ``function`` as its attention, without a mask, and go back to its own afterwards.

    Raises
    ------
    PipelineError
        The model computes its attention itself, not through transformers' attention interface.
    """
    active = _active.set(function)
    try:
        with attention_implementation(model, name):
            yield
    finally:
        _active.reset(active)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run ``model`` with the attention registered under ``name`` ("eager", "sdpa"), and go back afterwards.

    Raises as :func:`attention_function`.
    """
    text = model.config.get_text_config(decoder=True)
    previous = text._attn_implementation
    model.set_attn_implementation(name)
    try:
        if text._attn_implementation != name:
            raise own_attention(model)
        yield
    finally:
        model.set_attn_implementation(previous)


def own_attention(model: PreTrainedModel) -> PipelineError:
    """What is said of a model whose attention transformers' interface does not reach."""
    return PipelineError(
        f"{model.name_or_path or type(model).__name__}: {type(model).__name__} computes its attention itself, not "
        "through transformers' attention interface, so nothing can be captured or evicted; choose another model."
    )


def attention_weights(
    logits: Tensor, hidden: Tensor | None, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Softmax over the last dimension, as the families compute it; ``logits`` are overwritten.

    Parameters
    ----------
    logits
        (..., tokens), scaled, float32 (or float64).
    hidden
        Broadcasts to the logits; True where a token is not seen.
    softcap
        Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    sinks
        Broadcasts to (..., 1): the logit of a token that is no token, which takes its share of the attention
        (GPT-OSS). What is left for the tokens then sums to less than 1.

    Returns
    -------
    (..., tokens), the logits' dtype.
    """
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        logits.masked_fill_(hidden, float("-inf"))
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    columns = sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat([logits, columns], dim=-1), dim=-1)[..., :-1]


def shared_heads(sinks: Tensor | None, kv_heads: int, queries: int) -> Tensor | None:
    """The sink of each query where the query heads of a group are queries of their KV head.

    ``sinks`` is (heads,); returns (kv_heads, heads / kv_heads * queries, 1), a head's queries side by side.
    """
    if sinks is None:
        return None
    return sinks.view(kv_heads, -1, 1).expand(-1, -1, queries).reshape(kv_heads, -1, 1)
