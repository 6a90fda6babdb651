"""Run a language model once and record, per layer, what its cache holds and which tokens get attended to.

Capture is an attention function registered with transformers under the name ``kvp_capture``: model code
stays as it is. The function computes ordinary causal attention in chunks of queries and, on the way,
reduces the attention weights to the future-attention record (``pipeline/traces/importance.py``), so
memory is O(tokens x query_chunk), never tokens x tokens for all heads. Layers that slide over a window run
as they always do and leave no record.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.layers import full_attention_layers

ATTENTION_NAME = "kvp_capture"


@dataclass
class Recorder:
    """Collects the record of one sequence while the model runs.

    Attributes
    ----------
    block_size
        Queries per entry of the record. Block ``b`` holds the queries at positions
        ``b * block_size .. (b + 1) * block_size - 1``.
    query_chunk
        Queries whose attention weights are held at once.
    records
        layer -> (kv_heads, tokens, blocks) float32: attention mass that each token receives from each
        block of queries; the maximum over the query heads of a group, summed over the block.
    """

    block_size: int
    query_chunk: int
    records: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerTrace:
    """What one layer leaves behind for one sequence of n tokens.

    Attributes
    ----------
    keys, values
        (kv_heads, n, head_dim), model dtype; keys after RoPE, as they stand in the cache.
    record
        (kv_heads, n, blocks) float32, see :class:`Recorder`.
    """

    keys: Tensor
    values: Tensor
    record: Tensor


def capture_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    *,
    scaling: float,
    sliding_window: int | None = None,
    recorder: Recorder | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention that fills ``recorder``; signature of transformers' attention interface.

    Parameters
    ----------
    query
        (1, heads, q, head_dim). The q queries are the last q of the ``tokens`` cached positions.
    key, value
        (1, kv_heads, tokens, head_dim).
    sliding_window
        Tokens that a query sees, itself included. Where that leaves tokens out, nothing is recorded.

    Returns
    -------
    output
        (1, q, heads, head_dim), query's dtype.

    Notes
    -----
    With grouped-query attention the importance of a token is its maximum over the query heads of the
    group, as in the paper's reward (section "Reward"; not the mean).
    """
    if recorder is None:
        raise PipelineError(
            f"{type(module).__name__} does not pass keyword arguments to its attention; capture needs them."
        )
    if query.shape[0] != 1 or attention_mask is not None:
        raise PipelineError("Attention is captured for one sequence at a time, without padding.")
    if sliding_window is not None and key.shape[2] > sliding_window:
        return _sliding_attention(query, key, value, scaling, sliding_window, recorder.query_chunk), None
    heads, q_len, head_dim = query.shape[1:]
    kv_heads, tokens = key.shape[1:3]
    groups = heads // kv_heads
    offset = tokens - q_len  # position of the first query
    queries = query[0].view(kv_heads, groups, q_len, head_dim)
    keys, values = key[0], value[0]  # (kv_heads, tokens, head_dim)
    blocks = -(-tokens // recorder.block_size)
    record = torch.zeros(kv_heads, tokens, blocks, dtype=torch.float32, device=query.device)
    output = torch.empty_like(queries)
    start = 0
    while start < q_len:
        # Chunks end on multiples of the chunk size in absolute positions, so a block lies in one chunk.
        stop = min(
            q_len, (offset + start) // recorder.query_chunk * recorder.query_chunk + recorder.query_chunk - offset
        )
        size, visible = stop - start, offset + stop
        chunk = queries[:, :, start:stop].reshape(kv_heads, groups * size, head_dim)
        logits = torch.bmm(chunk, keys[:, :visible].transpose(1, 2)).mul_(scaling)
        logits = logits.view(kv_heads, groups, size, visible)
        hidden = torch.ones(size, size, dtype=torch.bool, device=query.device).triu_(1)
        logits[..., offset + start :].masked_fill_(hidden, float("-inf"))
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)  # (kv_heads, groups, size, visible)
        attended = torch.bmm(weights.to(value.dtype).view(kv_heads, groups * size, visible), values[:, :visible])
        output[:, :, start:stop] = attended.view(kv_heads, groups, size, head_dim)
        strongest = weights.amax(dim=1)  # (kv_heads, size, visible)
        for block in range((offset + start) // recorder.block_size, -(-visible // recorder.block_size)):
            first = max(block * recorder.block_size - offset - start, 0)
            last = min((block + 1) * recorder.block_size - offset - start, size)
            record[:, :visible, block] = strongest[:, first:last].sum(dim=1)
        start = stop
    recorder.records[module.layer_idx] = record  # type: ignore[index]  # every attention module carries its index
    return output.view(1, heads, q_len, head_dim).transpose(1, 2).contiguous(), None


def _sliding_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int, chunk: int) -> Tensor:
    q_len, tokens = query.shape[2], key.shape[2]
    offset = tokens - q_len  # position of the first query
    outputs = []
    for start in range(0, q_len, chunk):
        stop = min(start + chunk, q_len)
        first, last = max(offset + start - window + 1, 0), offset + stop  # tokens that any of these queries sees
        position = torch.arange(offset + start, last, device=query.device)[:, None]
        token = torch.arange(first, last, device=query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:last],
                value[:, :, first:last],
                attn_mask=(token <= position) & (token > position - window),
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION_NAME, capture_attention)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run ``model`` with a registered attention function, and go back to its own afterwards."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


@torch.inference_mode()
def run_captured(
    model: PreTrainedModel, input_ids: Tensor, cache: DynamicCache, block_size: int, query_chunk: int
) -> list[Tensor]:
    """Append ``input_ids`` to ``cache`` and return the record of the new queries.

    Parameters
    ----------
    input_ids
        (q,) int64 token ids that follow what the cache holds.
    cache
        A ``DynamicCache()`` that was given no config: sliding layers keep every token in it, like the others.

    Returns
    -------
    One (kv_heads, tokens, blocks) float32 tensor per layer of :func:`pipeline.layers.full_attention_layers`,
    ``tokens`` counting the cache after the call.
    """
    recorder = Recorder(block_size, query_chunk)
    with attention_implementation(model, ATTENTION_NAME):
        body = model.base_model
        body(input_ids=input_ids[None].to(model.device), past_key_values=cache, use_cache=True, recorder=recorder)
    return [recorder.records[layer] for layer in full_attention_layers(model.config)]


def capture_sequence(model: PreTrainedModel, input_ids: Tensor, block_size: int, query_chunk: int) -> list[LayerTrace]:
    """Prefill one sequence of n token ids; returns one :class:`LayerTrace` per layer that sees the whole context."""
    cache = DynamicCache()
    records = run_captured(model, input_ids, cache, block_size, query_chunk)
    traces = []
    for number, record in zip(full_attention_layers(model.config), records, strict=True):
        layer = cache.layers[number]
        assert layer.keys is not None
        assert layer.values is not None
        traces.append(LayerTrace(keys=layer.keys[0], values=layer.values[0], record=record))
    return traces
