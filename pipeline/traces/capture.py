"""Run a language model once and record, per layer, what its cache holds and which tokens get attended to.

Capture is an attention function (``pipeline/models/attention.py``): model code stays as it is. The function computes
ordinary causal attention in chunks of queries and, on the way, reduces the attention weights to the
future-attention record (``pipeline/traces/importance.py``), so memory is O(tokens x query_chunk), never tokens x
tokens for all heads. Layers that slide over a window run as they always do and leave no record. Logits and weights
are float32, whatever the model's dtype.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.models.attention import attention_function, attention_weights
from pipeline.models.forward import require_finite, run_model
from pipeline.models.layers import ModelLayer, RankedLayer, layer_number
from pipeline.models.layout import cache_layout


@dataclass(frozen=True)
class Tails:
    """Which attention is kept as it is: that of the last queries before some places.

    Attributes
    ----------
    cuts
        Cache sizes. The queries before each must be among the new ones.
    queries
        How many queries before each cut; fewer where the text begins.
    """

    cuts: tuple[int, ...] = ()
    queries: int = 0


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
    windows
        Number of a layer that slides over a window -> tokens that a query sees there, itself included.
    tails
        Whose attention weights are kept.
    observe
        Called with each recorded layer as soon as its attention is computed.
    records
        layer -> (kv_heads, tokens, blocks) float32: attention mass that each token receives from each
        block of queries; the maximum over the query heads of a group, summed over the block.
    """

    block_size: int
    query_chunk: int
    windows: Mapping[ModelLayer, int] = field(default_factory=dict)
    tails: Tails = Tails()
    observe: Callable[["ObservedLayer"], None] | None = None
    records: dict[ModelLayer, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ObservedLayer:
    """One layer as its attention has just been computed.

    Attributes
    ----------
    number
        The layer's number in the model.
    keys, values
        (kv_heads, tokens, head_dim), model dtype; keys after RoPE, as they stand in the cache.
    tails
        cut -> (heads, queries, cut) float32: attention of the last queries before each cut (:class:`Tails`).
    """

    number: ModelLayer
    keys: Tensor
    values: Tensor
    tails: Mapping[int, Tensor]


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
    recorder: Recorder,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention that fills ``recorder``; signature of transformers' attention interface.

    Parameters
    ----------
    query
        (1, heads, q, head_dim). The q queries are the last q of the ``tokens`` cached positions.
    key, value
        (1, kv_heads, tokens, head_dim).
    scaling
        What queries are multiplied by; by default, as in transformers, 1 / sqrt(head_dim).
    softcap, s_aux
        As ``softcap`` and ``sinks`` of :func:`pipeline.models.attention.attention_weights`; sinks are (heads,).

    Returns
    -------
    output
        (1, q, heads, head_dim), query's dtype.

    Notes
    -----
    With grouped-query attention the importance of a token is its maximum over the query heads of the
    group, as in the paper's reward (section "Reward"; not the mean).
    """
    if query.shape[0] != 1 or attention_mask is not None:
        raise PipelineError("Attention is captured for one sequence at a time, without padding.")
    number = layer_number(module)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = recorder.windows.get(number)
    if window is not None:
        output = _sliding_attention(query[0], key[0], value[0], scaling, window, recorder.query_chunk, softcap, s_aux)
        return output[None].transpose(1, 2).contiguous(), None
    output, record, tails = recorded_attention(query[0], key[0], value[0], scaling, recorder, softcap, s_aux)
    recorder.records[number] = record
    if recorder.observe is not None:
        recorder.observe(ObservedLayer(number, key[0], value[0], tails))
    return output[None].transpose(1, 2).contiguous(), None


def recorded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    recorder: Recorder,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Causal attention, its record and its tails, from one softmax over each chunk of queries.

    Parameters
    ----------
    query
        (heads, q, head_dim), the last q positions of ``tokens``.
    key, value
        (kv_heads, tokens, head_dim), of the same dtype.
    recorder
        Only its sizes are read.
    softcap, sinks
        As in :func:`pipeline.models.attention.attention_weights`; sinks are (heads,).

    Returns
    -------
    output
        (heads, q, head_dim), query's dtype.
    record
        (kv_heads, tokens, blocks) float32, see :class:`Recorder`; each block is contiguous.
    tails
        As in :class:`ObservedLayer`.
    """
    heads, q_len, head_dim = query.shape
    kv_heads, tokens = key.shape[:2]
    groups, block_size = heads // kv_heads, recorder.block_size
    offset = tokens - q_len  # position of the first query
    product = _product(key)
    grouped = query.view(kv_heads, groups, q_len, head_dim)
    columns = None if sinks is None else sinks.view(kv_heads, groups, 1, 1)
    output = torch.empty_like(grouped)
    dtype = torch.promote_types(query.dtype, torch.float32)
    record = torch.zeros(kv_heads, -(-tokens // block_size), tokens, dtype=dtype, device=query.device)
    tails = {
        cut: torch.zeros(heads, min(recorder.tails.queries, cut), cut, dtype=dtype, device=query.device)
        for cut in recorder.tails.cuts
    }
    for start, stop in _chunks(offset, q_len, recorder.query_chunk):
        visible = offset + stop
        weights = _weights(product(grouped[:, :, start:stop], visible, scaling), softcap, columns)
        rows = weights.to(value.dtype).flatten(1, 2)  # (kv_heads, groups * size, visible)
        output[:, :, start:stop] = torch.bmm(rows, value[:, :visible]).view(kv_heads, groups, -1, head_dim)
        _add_up(record, weights.amax(dim=1), offset + start, block_size)
        for cut, tail in tails.items():
            _keep_tail(tail, weights.flatten(0, 1), offset + start, cut)
    return output.view(heads, q_len, head_dim), record.transpose(1, 2), tails


def _product(key: Tensor) -> Callable[[Tensor, int, float], Tensor]:
    """Scaled products of queries with the first keys, in float32 at least.

    Called with (kv_heads, groups, size, head_dim), how many keys, and the scaling; returns (kv_heads, groups, size,
    keys). Rounded to a lower precision, logits would be wrong by more than the weights of most tokens.
    """
    on_gpu = key.device.type == "cuda" and key.dtype in (torch.bfloat16, torch.float16)
    exact = key if on_gpu else key.to(torch.promote_types(key.dtype, torch.float32))

    def product(queries: Tensor, keys: int, scaling: float) -> Tensor:
        transposed = exact[:, :keys].transpose(1, 2)
        if on_gpu:
            logits = torch.bmm(queries.flatten(1, 2), transposed, out_dtype=torch.float32).mul_(scaling)
        else:
            # Scaling the queries spares a pass over the logits, which are many more.
            logits = torch.bmm((queries.to(exact.dtype) * scaling).flatten(1, 2), transposed)
        return logits.view(*queries.shape[:3], keys)

    return product


def _chunks(offset: int, q_len: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut queries at positions ``offset .. offset + q_len - 1`` where a position is a multiple of ``chunk``.

    So a block whose size divides the chunk's lies in one chunk, and its sum is the same however a sequence is cut.
    """
    start = 0
    while start < q_len:
        stop = min(q_len, start + chunk - (offset + start) % chunk)
        yield start, stop
        start = stop


def _weights(logits: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Causal attention of the last queries, from their logits (kv_heads, groups, size, visible), which it overwrites.

    ``sinks`` is (kv_heads, groups, 1, 1).
    """
    size = logits.shape[2]
    if softcap is None and sinks is None:
        hidden = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu_(1)
        # Only a chunk's own tokens can lie after a query.
        logits[..., -size:].masked_fill_(hidden, float("-inf"))
        return torch.softmax(logits, dim=-1)
    visible = logits.shape[-1]
    hidden = torch.ones(size, visible, dtype=torch.bool, device=logits.device).triu_(visible - size + 1)
    return attention_weights(logits, hidden, softcap, sinks)


def _keep_tail(tail: Tensor, weights: Tensor, position: int, cut: int) -> None:
    """Copy the rows that belong to a tail (heads, queries, cut).

    Parameters
    ----------
    weights
        (heads, size, visible), of the queries at ``position .. position + size - 1``.
    """
    first = cut - tail.shape[1]  # position of the tail's first query
    low, high = max(position, first), min(position + weights.shape[1], cut)
    if low < high:
        seen = min(weights.shape[2], cut)
        tail[:, low - first : high - first, :seen] = weights[:, low - position : high - position, :seen]


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


def _sliding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int,
    chunk: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over the last ``window`` tokens: shapes as in :func:`recorded_attention`."""
    (heads, q_len), (kv_heads, tokens) = query.shape[:2], key.shape[:2]
    offset = tokens - q_len  # position of the first query
    grouped = query.view(kv_heads, heads // kv_heads, *query.shape[1:])
    columns = None if sinks is None else sinks.view(kv_heads, -1, 1, 1)
    outputs = []
    for start in range(0, q_len, chunk):
        stop = min(start + chunk, q_len)
        first, last = max(offset + start - window + 1, 0), offset + stop  # tokens that any of these queries sees
        position = torch.arange(offset + start, last, device=query.device)[:, None]
        token = torch.arange(first, last, device=query.device)
        visible = (token <= position) & (token > position - window)
        keys, values, queries = key[:, first:last], value[:, first:last], grouped[:, :, start:stop]
        if softcap is None and sinks is None:
            outputs.append(
                F.scaled_dot_product_attention(
                    query[None, :, start:stop],
                    keys[None],
                    values[None],
                    attn_mask=visible,
                    scale=scaling,
                    enable_gqa=True,
                )[0]
            )
            continue
        logits = _product(keys)(queries, last - first, scaling)
        rows = attention_weights(logits, ~visible, softcap, columns).to(values.dtype).flatten(1, 2)
        outputs.append(torch.bmm(rows, values).view(heads, stop - start, -1))
    return torch.cat(outputs, dim=1)


@torch.inference_mode()
def run_captured(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: DynamicCache,
    block_size: int,
    query_chunk: int,
    tails: Tails | None = None,
    observe: Callable[[RankedLayer, ObservedLayer], None] | None = None,
) -> list[Tensor]:
    """Append ``input_ids`` to ``cache`` and return the record of the new queries.

    Parameters
    ----------
    input_ids
        (q,) int64 token ids that follow what the cache holds.
    cache
        A ``DynamicCache()`` that was given no config: sliding layers keep every token in it, like the others.
    tails
        Whose attention weights ``observe`` wants to see; the queries must be among the new ones.
    observe
        Called with each ranked layer as soon as its attention is computed.

    Returns
    -------
    One (kv_heads, tokens, blocks) float32 tensor per layer of :attr:`pipeline.models.layout.CacheLayout.ranked`,
    ``tokens`` counting the cache after the call.

    Raises
    ------
    PipelineError
        The model's cache cannot be ranked (:func:`pipeline.models.layout.cache_layout`), or a key, a value, an
        attention weight or a logit is not finite.
    """
    layout = cache_layout(model)

    def finished(layer: ObservedLayer) -> None:
        for what, states in (("key", layer.keys), ("value", layer.values)):
            require_finite(model, states, f"a {what} of layer {layer.number}")
        if observe is not None:
            observe(RankedLayer(layout.ranked.index(layer.number)), layer)

    recorder = Recorder(block_size, query_chunk, layout.windows, tails or Tails(), finished)
    with attention_function(model, partial(capture_attention, recorder=recorder)):
        run_model(model, input_ids[None], cache, cache.get_seq_length(), keep=1)
    records = [recorder.records[layer] for layer in layout.ranked]
    for layer, record in zip(layout.ranked, records, strict=True):
        require_finite(model, record, f"an attention weight of layer {layer}")
    return records


def capture_sequence(model: PreTrainedModel, input_ids: Tensor, block_size: int, query_chunk: int) -> list[LayerTrace]:
    """Prefill one sequence of n token ids; returns one :class:`LayerTrace` per layer that sees the whole context."""
    cache = DynamicCache()
    records = run_captured(model, input_ids, cache, block_size, query_chunk)
    traces = []
    for number, record in zip(cache_layout(model).ranked, records, strict=True):
        layer = cache.layers[number]
        assert layer.keys is not None
        assert layer.values is not None
        traces.append(LayerTrace(keys=layer.keys[0], values=layer.values[0], record=record))
    return traces
