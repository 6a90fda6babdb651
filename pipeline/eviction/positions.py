"""Which token of a text each key of a cache is, where others evict, reorder and cut: kvpress hands over keys alone.

A key is looked up by its bits, so that it is found wherever it stands. Keys that were never seen are the tokens that
have come since, in their order.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError

LOST = (
    "Tokens were evicted, or their keys overwritten, before the policy saw them, so that it cannot know where they "
    "stand; let it see the prompt, too (PrefillDecodingPress(press, DecodingPress(press))), and use no press that "
    "merges or masks keys and no quantised cache."
)


class SeenKeys:
    """The keys of one layer, from the beginning of a text on."""

    def __init__(self) -> None:
        self._forward: weakref.ref[Tensor] | None = None
        self._marks = torch.empty(0, 0, 0, dtype=torch.int64)  # (batch, kv_heads, tokens), sorted
        self._places = self._marks  # the token of each

    def places(self, keys: Tensor, kwargs: Mapping[str, Any], layer: int) -> tuple[Tensor, int]:
        """Positions of the tokens of a cache, or of a part of it, and how many tokens the text has.

        Parameters
        ----------
        keys
            (batch, kv_heads, n, head_dim), as they stand in the cache.
        kwargs
            What the attention module was called with: hidden states and positions of the new tokens, and the cache.
            Without them the keys are a whole cache.
        layer
            The number of the layer in that cache.

        Returns
        -------
        positions
            (batch, kv_heads, n) int64.
        length
            The number of tokens up to now, evicted ones included.

        Raises
        ------
        PipelineError
            Some keys are those of tokens that this object was never shown, or texts of a batch have pads.
        """
        if "hidden_states" not in kwargs:
            n = keys.shape[2]
            return torch.arange(n, device=keys.device).expand(keys.shape[:3]), n
        first, length = _new_tokens(kwargs)
        known_forward = None if self._forward is None else self._forward()
        if known_forward is not kwargs["hidden_states"]:
            self._forward = weakref.ref(kwargs["hidden_states"])
            if first == 0 or self._marks.shape[:2] != keys.shape[:2]:
                self._forget(keys)
        marks = _marks(keys)
        known = self._find(marks)
        if keys.shape[2] == length and self._is_another_text(known):
            self._forget(keys)
            known = torch.full_like(marks, -1)
        new = known < 0
        columns = new[:1, :1]
        count, seen = int(columns.sum()), self._marks.shape[2]
        # In the forward of a prompt its keys may come in parts; later all that came since must be there, at the end.
        expected = length - seen if first else min(count, length - seen)
        if not first and count and kwargs["past_key_values"].get_seq_length(layer) != length:
            raise PipelineError(LOST)  # another press was here before
        last = columns[..., columns.shape[-1] - count :]
        if not torch.equal(new, columns.expand_as(new)) or count != expected or not last.all():
            raise PipelineError(LOST)
        positions = torch.where(new, seen + columns.cumsum(2) - 1, known)
        if count:
            self._marks = torch.cat([self._marks, marks[:, :, -count:]], dim=2)
            self._places = torch.cat([self._places, positions[:, :, -count:]], dim=2)
            order = self._marks.argsort(dim=2)
            self._marks, self._places = self._marks.gather(2, order), self._places.gather(2, order)
        return positions, length

    def _is_another_text(self, known: Tensor) -> bool:
        """Whether a cache of which nothing was evicted has but some tokens in common with the text before.

        In the first layer a key is that of a token and its place alone.
        """
        own = torch.arange(known.shape[2], device=known.device)
        seen = self._marks.shape[2]
        return bool(((known < 0) | (known == own)).all()) and not bool((known[..., :seen] >= 0).all())

    def _forget(self, keys: Tensor) -> None:
        self._marks = torch.empty(*keys.shape[:2], 0, dtype=torch.int64, device=keys.device)
        self._places = self._marks

    def _find(self, marks: Tensor) -> Tensor:
        """The place of each mark, -1 for those that are new."""
        if not self._marks.shape[2]:
            return torch.full_like(marks, -1)
        index = torch.searchsorted(self._marks, marks).clamp_max(self._marks.shape[2] - 1)
        return torch.where(self._marks.gather(2, index) == marks, self._places.gather(2, index), -1)


def _new_tokens(kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Position of the first new token, and how many tokens there are with the last."""
    positions = kwargs.get("position_ids")
    positions = kwargs["cache_position"][None] if positions is None else positions
    if not torch.equal(positions, positions[:1].expand_as(positions)):
        raise PipelineError("kvpress knows no pads; give it one text at a time, or texts of one length.")
    return int(positions[0, 0]), int(positions[0, -1]) + 1


def _marks(keys: Tensor) -> Tensor:
    """A number for each vector, (..., head_dim) -> (...): equal for equal bits, and else with a chance of 1 in 2^64."""
    bits = keys.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[keys.itemsize]).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (keys.shape[-1],), generator=generator, dtype=torch.int64) * 2 + 1
    return (bits * factors.to(keys.device)).sum(-1)
