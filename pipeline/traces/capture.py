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
    output, record = recorded_attention(query[0], key[0], value[0], scaling, recorder)
    recorder.records[module.layer_idx] = record  # type: ignore[index]  # every attention module carries its index
    return output[None].transpose(1, 2).contiguous(), None


def recorded_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, recorder: Recorder
) -> tuple[Tensor, Tensor]:
    """Causal attention and its record, from one softmax over each chunk of queries.

    Parameters
    ----------
    query
        (heads, q, head_dim), the last q positions of ``tokens``.
    key, value
        (kv_heads, tokens, head_dim), of the same dtype.
    recorder
        Only its sizes are read.

    Returns
    -------
    output
        (heads, q, head_dim), query's dtype.
    record
        (kv_heads, tokens, blocks) float32, see :class:`Recorder`; each block is contiguous.
    """
    heads, q_len, head_dim = query.shape
    kv_heads, tokens = key.shape[:2]
    groups, block_size = heads // kv_heads, recorder.block_size
    offset = tokens - q_len  # position of the first query
    # Scaling the queries spares a pass over the logits, which are many more.
    queries = (query * scaling).view(kv_heads, groups, q_len, head_dim)
    output = torch.empty_like(queries)
    record = torch.zeros(kv_heads, -(-tokens // block_size), tokens, dtype=torch.float32, device=query.device)
    for start, stop in _chunks(offset, q_len, recorder.query_chunk):
        weights = _weights(queries[:, :, start:stop], key[:, : offset + stop])
        rows = weights.to(value.dtype).flatten(1, 2)  # (kv_heads, groups * size, visible)
        output[:, :, start:stop] = torch.bmm(rows, value[:, : offset + stop]).view(kv_heads, groups, -1, head_dim)
        _add_up(record, weights.amax(dim=1), offset + start, block_size)
    return output.view(heads, q_len, head_dim), record.transpose(1, 2)


def _chunks(offset: int, q_len: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut queries at positions ``offset .. offset + q_len - 1`` where a position is a multiple of ``chunk``.

    So a block whose size divides the chunk's lies in one chunk, and its sum is the same however a sequence is cut.
    """
    start = 0
    while start < q_len:
        stop = min(q_len, start + chunk - (offset + start) % chunk)
        yield start, stop
        start = stop


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of the last queries: (kv_heads, groups, size, head_dim), (kv_heads, visible, head_dim).

    Returns (kv_heads, groups, size, visible) float32.
    """
    size = queries.shape[2]
    logits = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2)).view(*queries.shape[:3], -1)
    hidden = torch.ones(size, size, dtype=torch.bool, device=queries.device).triu_(1)
    logits[..., -size:].masked_fill_(hidden, float("-inf"))  # only a chunk's own tokens can lie after a query
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def _add_up(record: Tensor, strongest: Tensor, position: int, block_size: int) -> None:
    """Sum attention over blocks of queries into the record.

    Parameters
    ----------
    record
        (kv_heads, blocks, tokens), added to: a block may be larger than a chunk of queries.
    strongest
        (kv_heads, size, visible), of the queries at ``position .. position + size - 1``.
    """
    visible = strongest.shape[-1]
    for block in range(position // block_size, -(-visible // block_size)):
        first, last = (max(edge * block_size - position, 0) for edge in (block, block + 1))
        record[:, block, :visible] += strongest[:, first:last].sum(dim=1)


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
