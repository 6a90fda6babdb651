"""Run a language model once and measure, per layer, how much attention cached tokens get from what follows them.

Capture is an attention function (``pipeline/models/attention.py``): model code stays as it is. Queries whose attention
nobody asks for go through torch's fused kernel. The others are computed in chunks, and their weights are added up on
the way, so memory is the cache, a chunk of queries, and a number per token, head and cut, never tokens x tokens. Layers
that slide over a window run as they always do and leave nothing. Logits and weights are float32, whatever the model's
dtype.
"""

import itertools
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

# Attention weights that are held at once: on a CPU so many that they stay in its cache, on a GPU enough to fill it.
WEIGHTS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 28}
# More queries at once look at too many tokens behind them; fewer are slow to multiply, or to launch.
QUERIES_PER_CHUNK = {"cpu": 64, "cuda": 512}
# Keys that a chunk looks at are a multiple of this: rows of weights that begin at odd addresses are a tenth slower.
ALIGNMENT = 16


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

    def first(self, cut: int) -> int:
        """Position of the first query before ``cut``."""
        return max(0, cut - self.queries)


@dataclass
class Recorder:
    """Collects what is measured while the model runs.

    Attributes
    ----------
    cuts
        Cache sizes at which importance is asked for.
    windows
        Number of a layer that slides over a window -> tokens that a query sees there, itself included.
    tails
        Whose attention weights are kept.
    observe
        Called with each recorded layer as soon as its attention is computed.
    """

    cuts: tuple[int, ...]
    windows: Mapping[ModelLayer, int] = field(default_factory=dict)
    tails: Tails = Tails()
    observe: Callable[["ObservedLayer"], None] | None = None


@dataclass(frozen=True)
class ObservedLayer:
    """One layer as its attention has just been computed.

    Attributes
    ----------
    number
        The layer's number in the model.
    keys, values
        (kv_heads, tokens, head_dim), model dtype; keys after RoPE, as they stand in the cache.
    importance
        cut -> (kv_heads, cut) float32: the attention that the first ``cut`` tokens receive from the new queries behind
        them, the maximum over the query heads of a group, summed over the queries (paper, section "Reward").
    tails
        cut -> (heads, queries, cut) float32: attention of the last queries before each cut (:class:`Tails`).
    """

    number: ModelLayer
    keys: Tensor
    values: Tensor
    importance: Mapping[int, Tensor]
    tails: Mapping[int, Tensor]


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
    """Causal attention that reports to ``recorder``; signature of transformers' attention interface.

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
    """
    if query.shape[0] != 1 or attention_mask is not None:
        raise PipelineError("Attention is captured for one sequence at a time, without padding.")
    number = layer_number(module)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = recorder.windows.get(number)
    if window is not None:
        output = _sliding_attention(query[0], key[0], value[0], scaling, window, softcap, s_aux)
        return output[None].transpose(1, 2).contiguous(), None
    output, importance, tails = recorded_attention(
        query[0], key[0], value[0], scaling, recorder.cuts, recorder.tails, softcap, s_aux
    )
    if recorder.observe is not None:
        recorder.observe(ObservedLayer(number, key[0], value[0], importance, tails))
    return output[None], None


def recorded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    cuts: tuple[int, ...],
    tails: Tails = Tails(),
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """Causal attention, importances and tails; one softmax over each chunk of the queries that they are made of.

    Parameters
    ----------
    query
        (heads, q, head_dim), the last q positions of ``tokens``.
    key, value
        (kv_heads, tokens, head_dim), of the same dtype.
    cuts
        Cache sizes, each at most ``tokens``.
    softcap, sinks
        As in :func:`pipeline.models.attention.attention_weights`; sinks are (heads,).

    Returns
    -------
    output
        (q, heads, head_dim), query's dtype.
    importance, tails
        As in :class:`ObservedLayer`.
    """
    heads, q_len, head_dim = query.shape
    kv_heads, tokens = key.shape[:2]
    offset = tokens - q_len  # position of the first query
    groups = heads // kv_heads
    output = torch.empty(q_len, kv_heads, groups, head_dim, dtype=query.dtype, device=query.device)
    dtype, exact = _dtypes(query)
    places = sorted(set(cuts))
    # From the queries between a cut and the next one.
    received = {cut: torch.zeros(kv_heads, cut, dtype=dtype, device=query.device) for cut in places}
    kept = {
        cut: torch.zeros(kv_heads, groups, cut - tails.first(cut), cut, dtype=dtype, device=query.device)
        for cut in tails.cuts
    }
    # torch's kernel looks at as many keys as there are queries, and knows neither caps nor sinks.
    plain = offset == 0 and softcap is None and sinks is None
    start = min([q_len, *places, *map(tails.first, tails.cuts)]) if plain else 0
    if start:
        fused = F.scaled_dot_product_attention(
            query[None, :, :start],
            key[None, :, :start],
            value[None, :, :start],
            is_causal=True,
            scale=scaling,
            enable_gqa=groups > 1,
        )
        output[:start] = fused.view(kv_heads, groups, start, head_dim).permute(2, 0, 1, 3)
    together = kv_heads if query.device.type == "cuda" else 1
    size = queries_at_once(groups * together * tokens, query.device.type)
    # The query heads of a group side by side, so that a chunk of queries is one matrix for each KV head.
    queries = torch.empty(kv_heads, q_len, groups, head_dim, dtype=exact, device=query.device)
    queries.copy_(query.view(kv_heads, groups, q_len, head_dim).transpose(1, 2))
    if exact == dtype:
        queries.mul_(scaling)  # spares a pass over the logits, which are many more
    behind = (0, 0, 0, -tokens % ALIGNMENT)
    keys, values = F.pad(key, behind).to(exact).transpose(1, 2), F.pad(value, behind)
    # Where a chunk's first query is the first row, a key after each.
    later = torch.ones(size, size + ALIGNMENT, dtype=torch.bool, device=query.device).triu_(1)
    for block in (slice(head, head + together) for head in range(0, kv_heads, together)):
        sink = None if sinks is None else sinks.view(kv_heads, 1, -1, 1)[block]
        for first, last in _chunks(offset + start, tokens, places, size):
            rows, visible = slice(first - offset, last - offset), -(-last // ALIGNMENT) * ALIGNMENT
            logits = _product(queries[block, rows].flatten(1, 2), keys[block, :, :visible], dtype)
            if exact != dtype:
                logits.mul_(scaling)
            hidden = later[: last - first, None, : visible - first]
            weights = _weights(logits.view(-1, last - first, groups, visible), hidden, softcap, sink)
            flat = weights.to(value.dtype).flatten(1, 2)  # (together, size * groups, visible)
            outputs = torch.bmm(flat, values[block, :visible]).view(-1, last - first, groups, head_dim)
            output[rows, block] = outputs.transpose(0, 1)
            if before := [cut for cut in places if cut <= first]:
                received[before[-1]][block] += weights[..., : before[-1]].amax(dim=2).sum(dim=1)
            for cut, tail in kept.items():
                _keep_tail(tail[block], weights.transpose(1, 2), first, cut)
    for cut, next_cut in reversed(list(itertools.pairwise(places))):
        received[cut] += received[next_cut][:, :cut]
    return output.flatten(1, 2), received, {cut: tail.flatten(0, 1) for cut, tail in kept.items()}


def _dtypes(query: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of logits and weights, float32 at least, and of what the logits are products of."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # On a GPU alone, products of a lower precision can be float32.
    return dtype, query.dtype if query.device.type == "cuda" else dtype


def _product(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """(heads, q, head_dim) times (heads, head_dim, n), as ``dtype``.

    Rounded to a lower precision, logits would be wrong by more than the weights of most tokens.
    """
    return torch.bmm(queries, keys) if queries.dtype == dtype else torch.bmm(queries, keys, out_dtype=dtype)


def _chunks(first: int, tokens: int, places: list[int], size: int) -> Iterator[tuple[int, int]]:
    """Cut the queries at positions ``first .. tokens - 1`` at every place and every multiple of ``size``."""
    while first < tokens:
        last = min((first // size + 1) * size, tokens, *(place for place in places if place > first))
        yield first, last
        first = last


def queries_at_once(weights: int, device: str) -> int:
    """Queries of a chunk where each has so many ``weights``, on a device of a type ("cpu", "cuda")."""
    most = WEIGHTS_PER_CHUNK.get(device, 1 << 24) // weights // ALIGNMENT * ALIGNMENT
    return min(max(most, ALIGNMENT), QUERIES_PER_CHUNK.get(device, 64))


def _weights(logits: Tensor, hidden: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention of a chunk's queries, from their logits (kv_heads, size, groups, visible), which it overwrites.

    ``hidden`` is (size, 1, n), for the last n keys: none before them lies after a query. ``sinks`` is (kv_heads, 1,
    groups, 1).
    """
    if softcap is None and sinks is None:
        logits[..., -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
        # In place: it would take a third longer to fill other memory.
        return torch.softmax(logits, dim=-1, out=logits)
    return attention_weights(logits, F.pad(hidden, (logits.shape[-1] - hidden.shape[-1], 0)), softcap, sinks)


def _keep_tail(tail: Tensor, weights: Tensor, position: int, cut: int) -> None:
    """Copy the rows that belong to a tail (..., queries, cut).

    Parameters
    ----------
    weights
        (..., size, visible), of the queries at ``position .. position + size - 1``.
    """
    first = cut - tail.shape[-2]  # position of the tail's first query
    low, high = max(position, first), min(position + weights.shape[-2], cut)
    if low < high:
        seen = min(weights.shape[-1], cut)
        tail[..., low - first : high - first, :seen] = weights[..., low - position : high - position, :seen]


def _sliding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention over the last ``window`` tokens: shapes as in :func:`recorded_attention`."""
    (heads, q_len), (kv_heads, tokens) = query.shape[:2], key.shape[:2]
    offset = tokens - q_len  # position of the first query
    grouped = query.view(kv_heads, heads // kv_heads, *query.shape[1:])
    columns = None if sinks is None else sinks.view(kv_heads, -1, 1, 1)
    dtype, exact = _dtypes(query)
    size = min(window, queries_at_once(heads * min(2 * window, tokens), query.device.type))
    outputs = []
    for start in range(0, q_len, size):
        stop = min(start + size, q_len)
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
        product = _product(queries.to(exact).flatten(1, 2), keys.to(exact).transpose(1, 2), dtype).mul_(scaling)
        logits = product.view(*queries.shape[:3], last - first)
        rows = attention_weights(logits, ~visible, softcap, columns).to(values.dtype).flatten(1, 2)
        outputs.append(torch.bmm(rows, values).view(heads, stop - start, -1))
    return torch.cat(outputs, dim=1)


@torch.inference_mode()
def run_captured(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: DynamicCache,
    cuts: tuple[int, ...],
    tails: Tails = Tails(),
    observe: Callable[[RankedLayer, ObservedLayer], None] | None = None,
) -> dict[int, Tensor]:
    """Append ``input_ids`` to ``cache`` and return how much attention the new queries give to what lies before them.

    Parameters
    ----------
    input_ids
        (q,) int64 token ids that follow what the cache holds.
    cache
        A ``DynamicCache()`` that was given no config: sliding layers keep every token in it, like the others.
    cuts
        Cache sizes, each at most that of the cache after the call.
    tails
        Whose attention weights ``observe`` wants to see; the queries must be among the new ones.
    observe
        Called with each ranked layer as soon as its attention is computed.

    Returns
    -------
    cut -> (layers, kv_heads, cut) float32, see :class:`ObservedLayer`; layers are those of
    :attr:`pipeline.models.layout.CacheLayout.ranked`. Where all queries behind a cut are new ones, and the text is what
    truly follows, this is the future importance of the paper's reward.

    Raises
    ------
    PipelineError
        The model's cache cannot be ranked (:func:`pipeline.models.layout.cache_layout`), or a key, a value, an
        attention weight or a logit is not finite.
    """
    layout = cache_layout(model)
    importance: dict[int, list[Tensor]] = {cut: [] for cut in cuts}

    def finished(layer: ObservedLayer) -> None:
        checked = [("a key", layer.keys), ("a value", layer.values)]
        checked += [("an attention weight", states) for states in layer.importance.values()]
        # One look for all of them: each makes the host wait for a GPU.
        extremes = torch.stack([extreme.float() for _, states in checked for extreme in torch.aminmax(states)])
        if not extremes.isfinite().all():
            for what, states in checked:
                require_finite(model, states, f"{what} of layer {layer.number}")
        for cut, received in layer.importance.items():
            importance[cut].append(received)
        if observe is not None:
            observe(RankedLayer(layout.ranked.index(layer.number)), layer)

    recorder = Recorder(cuts, layout.windows, tails, finished)
    with attention_function(model, partial(capture_attention, recorder=recorder)):
        run_model(model, input_ids[None], cache, cache.get_seq_length(), keep=1)
    return {cut: torch.stack(layers) for cut, layers in importance.items()}
