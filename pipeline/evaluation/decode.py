"""Decode many evicted copies of one cache together, each with its own budget.

Rows are (policy, budget) pairs of one sample. Rows of the same budget form a group with its own key and
value buffers, so nothing is padded and memory falls with the budget; linear layers run over all rows at
once. All rows are at the same position of the same text: kept tokens keep their positions, new tokens
continue after the whole prompt. It knows no policies and no metrics.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel

from pipeline.evaluation.sliding import SlidingLayer
from pipeline.models.attention import attention_function, attention_weights, shared_heads
from pipeline.models.forward import run_model
from pipeline.models.layers import ModelLayer, layer_number

# Logits that are held at once: those of all rows and tokens would be rows x t x vocabulary.
_LOGIT_BYTES = 1 << 30


@dataclass
class _Group:
    """Rows that keep the same number of tokens.

    ``keys`` and ``values``: per evicted layer (rows, kv_heads, budget + reserved, head_dim).
    """

    rows: int
    budget: int
    keys: list[Tensor]
    values: list[Tensor]


class EvictedCache(Cache):
    """Evicted copies of one prefilled cache; grows in place as tokens are appended.

    Parameters
    ----------
    reserve
        New tokens that each row will hold at most.
    sliding
        Number of a layer -> its cache, for the layers that are not evicted; groups hold the others, in order.
    """

    def __init__(self, reserve: int, sliding: Mapping[ModelLayer, SlidingLayer] | None = None) -> None:
        super().__init__(layers=[])
        self.reserve, self.sliding = reserve, dict(sliding or {})
        self.appended = 0
        self.groups: list[_Group] = []

    def add_group(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Add rows of one budget.

        Parameters
        ----------
        keys, values
            Per evicted layer (rows, kv_heads, budget, head_dim), already gathered.
        """
        rows, _, budget, _ = keys[0].shape
        pad = (0, 0, 0, self.reserve)
        self.groups.append(
            _Group(rows, budget, [F.pad(layer, pad) for layer in keys], [F.pad(layer, pad) for layer in values])
        )

    @property
    def rows(self) -> int:
        """Rows over all groups."""
        return sum(group.rows for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values occupy, the reserved slots included."""
        evicted = sum(tensor.nbytes for group in self.groups for tensor in (*group.keys, *group.values))
        return evicted + sum(layer.nbytes for layer in self.sliding.values())

    def slot(self, layer: ModelLayer) -> int:
        """Where a group holds a layer."""
        return layer - sum(other < layer for other in self.sliding)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append new states (rows, kv_heads, t, head_dim) to layer ``layer_idx``; attention reads the groups."""
        first_row, new = 0, key_states.shape[2]
        if self.appended + new > self.reserve:
            raise ValueError(f"{self.appended + new} new tokens exceed the {self.reserve} reserved")
        number = ModelLayer(layer_idx)
        if number in self.sliding:
            self.sliding[number].append(key_states, value_states)
            return key_states, value_states
        layer = self.slot(number)
        for group in self.groups:
            rows = slice(first_row, first_row + group.rows)
            slots = slice(group.budget + self.appended, group.budget + self.appended + new)
            group.keys[layer][:, :, slots] = key_states[rows]
            group.values[layer][:, :, slots] = value_states[rows]
            first_row += group.rows
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """New tokens appended so far (groups differ in how many old ones they keep)."""
        return self.appended

    def rewind(self, appended: int = 0) -> None:
        """Forget all but the first ``appended`` new tokens; their slots are written again."""
        self.appended = appended
        for layer in self.sliding.values():
            layer.rewind(appended)

    def select(self, keep: Tensor) -> None:
        """Drop finished rows: ``keep`` is (rows,) bool."""
        remaining, first_row = [], 0
        for group in self.groups:
            mask = keep[first_row : first_row + group.rows]
            first_row += group.rows
            if not mask.all():
                group.keys = [layer[mask] for layer in group.keys]
                group.values = [layer[mask] for layer in group.values]
                group.rows = int(mask.sum())
            if group.rows:
                remaining.append(group)
        self.groups = remaining
        for layer in self.sliding.values():
            layer.select(keep)


def evicted_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    *,
    evicted: EvictedCache,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over an :class:`EvictedCache`; signature of transformers' attention interface.

    Parameters
    ----------
    query
        (rows, heads, t, head_dim), the t newest tokens of every row.
    scaling, softcap, s_aux
        As in :func:`pipeline.traces.capture.capture_attention`.

    Returns
    -------
    (rows, t, heads, head_dim).
    """
    number = layer_number(module)
    heads, new, head_dim = query.shape[1:]
    scaling = head_dim**-0.5 if scaling is None else scaling
    kv_heads = key.shape[1]
    if number in evicted.sliding:
        attended = evicted.sliding[number].attend(query, scaling, softcap, s_aux)
        return attended.transpose(1, 2).contiguous(), None
    layer = evicted.slot(number)
    per_head = heads // kv_heads  # query heads of one KV head
    # The query heads of a group become further queries of its KV head: keys and values are read once, not
    # expanded to all heads.
    stacked = query.reshape(-1, kv_heads, per_head * new, head_dim)
    sinks = shared_heads(s_aux, kv_heads, new)
    outputs, first_row = [], 0
    for group in evicted.groups:
        length = group.budget + evicted.appended + new
        visible = None
        if new > 1:
            # Everything that was cached before is visible; among the new tokens attention is causal.
            visible = torch.ones(new, length, dtype=torch.bool, device=query.device).tril_(length - new)
            visible = visible.repeat(per_head, 1)
        rows = slice(first_row, first_row + group.rows)
        queries, keys, values = stacked[rows], group.keys[layer][:, :, :length], group.values[layer][:, :, :length]
        if softcap is None and sinks is None:
            outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scaling))
        else:
            dtype = torch.promote_types(query.dtype, torch.float32)
            logits = queries.to(dtype) @ keys.to(dtype).transpose(2, 3) * scaling
            weights = attention_weights(logits, None if visible is None else ~visible, softcap, sinks)
            outputs.append(weights.to(values.dtype) @ values)
        first_row += group.rows
    output = torch.cat(outputs).view(-1, heads, new, head_dim)
    return output.transpose(1, 2).contiguous(), None


# tokens (rows, t), position of the first, how many of the last are wanted -> logits (rows, keep, vocabulary)
_Run = Callable[[Tensor, int, int], Tensor]


@contextmanager
def _evicted(model: PreTrainedModel, cache: EvictedCache) -> Iterator[_Run]:
    """Yield a call that appends tokens (rows, t) at a position and returns the logits of the last ``keep`` of them."""

    def run(tokens: Tensor, position: int, keep: int) -> Tensor:
        logits = run_model(model, tokens, cache, position, keep)
        cache.appended += tokens.shape[1]
        return logits

    with attention_function(model, partial(evicted_attention, evicted=cache)):
        yield run


@torch.inference_mode()
def greedy_decode(
    model: PreTrainedModel,
    cache: EvictedCache,
    first_tokens: Sequence[int],
    position: int,
    max_new_tokens: int,
    is_finished: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Generate greedily from every row.

    Parameters
    ----------
    first_tokens, position
        The last token of the compressed context, fed again so that already the first generated token comes
        from the evicted cache, the late question behind it, and the position of the first of them.
    is_finished
        Whether a row with these generated tokens needs no more.

    Returns
    -------
    Generated token ids per row, in row order, the token that finished a row included.
    """
    with _evicted(model, cache) as run:
        generated: list[list[int]] = [[] for _ in range(cache.rows)]
        active = list(range(cache.rows))
        tokens = torch.tensor(first_tokens, device=model.device).expand(cache.rows, -1)
        for _ in range(max_new_tokens):
            chosen = run(tokens, position, 1)[:, -1].argmax(-1)
            position += tokens.shape[1]
            for row, token in zip(active, chosen.tolist(), strict=True):
                generated[row].append(token)
            running = torch.tensor([not is_finished(generated[row]) for row in active])
            if not running.any():
                break
            if not running.all():
                cache.select(running.to(model.device))
                active = [row for row, going in zip(active, running.tolist(), strict=True) if going]
                chosen = chosen[running.to(model.device)]
            tokens = chosen[:, None]
        return generated


@torch.inference_mode()
def continuation_nll(model: PreTrainedModel, cache: EvictedCache, continuation: Tensor, position: int) -> Tensor:
    """Negative log-likelihood of a true continuation under every row.

    Parameters
    ----------
    continuation
        (t + 1,) int64: the last token of the compressed context, then the t true tokens.
    position
        Position of that token.

    Returns
    -------
    (rows, t) float32, nats per token.
    """
    with _evicted(model, cache) as run:
        return _nll(model, run, cache.rows, continuation[:-1], continuation[1:], position)


@torch.inference_mode()
def choice_nll(
    model: PreTrainedModel,
    cache: EvictedCache,
    first_tokens: Sequence[int],
    choices: Sequence[Sequence[int]],
    position: int,
) -> Tensor:
    """Negative log-likelihood of several continuations of the same text under every row.

    Parameters
    ----------
    first_tokens, position
        As in :func:`greedy_decode`: the text that comes before each choice. It is run once.
    choices
        Token ids of each continuation; no choice is empty.

    Returns
    -------
    (rows, choices) float32, nats, summed over the tokens of a choice.
    """
    with _evicted(model, cache) as run:
        first = torch.tensor(first_tokens, device=model.device)
        before = run(first.expand(cache.rows, -1), position, 1)[:, -1].float()  # (rows, vocabulary)
        appended = cache.appended
        found = []
        for choice in choices:
            cache.rewind(appended)
            targets = torch.tensor(choice, device=model.device)
            nll = F.cross_entropy(before, targets[:1].expand(cache.rows), reduction="none")
            if len(choice) > 1:
                nll = nll + _nll(model, run, cache.rows, targets[:-1], targets[1:], position + len(first)).sum(-1)
            found.append(nll)
        return torch.stack(found, dim=1)


def _nll(model: PreTrainedModel, run: _Run, rows: int, inputs: Tensor, targets: Tensor, position: int) -> Tensor:
    """Negative log-likelihood of ``targets`` after each of ``inputs``: (t,), (t,) int64 -> (rows, t) float32."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    step = max(1, _LOGIT_BYTES // (rows * vocabulary * model.dtype.itemsize))
    found = []
    for first in range(0, len(inputs), step):
        tokens = inputs[first : first + step]
        logits = run(tokens.expand(rows, -1), position + first, len(tokens))
        expected = targets[first : first + step].to(logits.device)
        found.append(torch.stack([F.cross_entropy(row.float(), expected, reduction="none") for row in logits]))
    return torch.cat(found, dim=1)
