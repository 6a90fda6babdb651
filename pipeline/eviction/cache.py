"""A cache for ``model.generate`` that keeps a budget: what is evicted is freed, and what stays keeps its position.

A layer that attends to the whole context holds at most ``budget`` tokens of each head. A read of several tokens, as of
a prompt or a part of it, attends to all of them and to what is held, and leaves the budget; tokens that are written one
by one may exceed it by ``slack`` until all are ranked again. Layers that slide over a window stay as they are.

Masks need no work. To transformers the held tokens are the last ones before the new ones: they come in their order, so
that every new token sees all of them, and pads, which are evicted first, come first. Of these last columns of an
attention mask as many are 0 as pads are held.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from pipeline.errors import PipelineError
from pipeline.eviction.budget import gather_tokens, kept_tokens, rank_behind
from pipeline.models.layers import ModelLayer, RankedLayer
from pipeline.models.layout import cache_layout
from pipeline.policy.agents import Policy
from pipeline.policy.inputs.base import CachedTokens


@dataclass(frozen=True)
class _Options:
    """Arguments of :class:`KVPCache`; ``pads`` are how many stand before each text, None where that is not known."""

    budget: int
    slack: int
    n_sink: int
    n_recent: int
    pads: Tensor | None


class KVPCache(Cache):
    """A cache that a trained policy keeps to a budget, over prompts, parts of prompts, answers and turns.

    Parameters
    ----------
    policy
        From :meth:`Policy.from_pretrained`.
    budget
        Tokens that each head of a layer keeps, the protected ones included.
    slack
        Tokens that may be written above the budget until all are ranked again.
    n_sink, n_recent
        Tokens at the start and end of a text that are always kept.
    attention_mask
        (batch, tokens), 0 for pads, of a batch whose texts were filled up on the left. Later turns must have no pads.
    model
        That the cache is for. Needed where some of its layers slide over a window; otherwise it serves to check that
        the policy is one for it.

    Raises
    ------
    PipelineError
        The budget does not hold the protected tokens, pads are not on the left, or the policy is for another model.

    Examples
    --------
    >>> policy = Policy.from_pretrained("policies/smollm2-135m/ruler/exact")
    >>> cache = KVPCache(policy, budget=512)
    >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        policy: Policy,
        budget: int,
        *,
        slack: int = 64,
        n_sink: int = 4,
        n_recent: int = 16,
        attention_mask: Tensor | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(layers=[])
        counts = {"budget": budget, "slack": slack, "n_sink": n_sink, "n_recent": n_recent}
        for name, count in counts.items():
            if type(count) is not int or count < (name == "budget"):
                raise PipelineError(f"{name}={count} is no number of tokens; {int(name == 'budget')} is the least.")
        if budget < n_sink + n_recent:
            raise PipelineError(f"budget={budget} is below the {n_sink + n_recent} protected tokens; raise it.")
        self._policy, self._ranked = policy, policy.layer_numbers
        self._options = _Options(budget, slack, n_sink, n_recent, _pads(attention_mask))
        self._windows = {} if model is None else _windows(policy, model)

    # Which tokens stay is decided while the model runs: a compiler would compile anew for each number of them.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`transformers.Cache.update`."""
        if layer_idx == 0 and self.layers and len(self.layers) <= self._ranked[-1]:
            raise PipelineError(
                f"The policy ranks layers {', '.join(map(str, self._ranked))} of a model, and this one has "
                f"{len(self.layers)}; train a policy for this model."
            )
        while len(self.layers) <= layer_idx:
            self.layers.append(self._layer(ModelLayer(len(self.layers))))
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, cache_kwargs)
        return found

    def _layer(self, number: ModelLayer) -> CacheLayerMixin:
        if number in self._ranked:
            return _RankedLayer(self._policy, RankedLayer(self._ranked.index(number)), self._options)
        if number in self._windows:
            return DynamicSlidingWindowLayer(self._windows[number])
        raise PipelineError(
            f"The policy ranks layers {', '.join(map(str, self._ranked))} of a model, not {number}; name the model "
            "(model=...) if this layer slides over a window, or take a policy for this model."
        )

    def reset(self) -> None:
        """Forget everything."""
        self.layers.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that all layers have allocated."""
        return sum(map(_allocated, self.layers))

    @property
    def nbytes_of_all(self) -> int:
        """Bytes that all layers would take if nothing were evicted."""
        return sum(
            layer.nbytes_of_all if isinstance(layer, _RankedLayer) else _allocated(layer) for layer in self.layers
        )

    @property
    def held(self) -> int:
        """Tokens that each head of a ranked layer holds."""
        return max((layer.held for layer in self.layers if isinstance(layer, _RankedLayer)), default=0)


def _allocated(layer: CacheLayerMixin) -> int:
    if not layer.is_initialized:
        return 0
    states = [getattr(layer, name, None) for name in ("keys", "values", "positions")]
    return sum(found.untyped_storage().nbytes() for found in states if found is not None)


def _pads(attention_mask: Tensor | None) -> Tensor | None:
    """(batch,) int64: how many zeros a mask begins with; there must be none behind a one."""
    if attention_mask is None:
        return None
    mask = attention_mask.long()
    if mask.dim() != 2 or (mask.diff(dim=1) < 0).any():
        raise PipelineError(
            "The attention mask has pads behind a text or within it; fill texts up on the left "
            "(tokenizer.padding_side = 'left')."
        )
    return (mask == 0).sum(1).cpu()


def _windows(policy: Policy, model: PreTrainedModel) -> dict[ModelLayer, int]:
    """Number of a sliding layer -> its window, of a model that the policy is for."""
    layout, shape = cache_layout(model), policy.shape
    ranked = (policy.layer_numbers, shape.kv_heads, shape.head_dim)
    found = (layout.ranked, layout.kv_heads, layout.head_dim)
    if ranked != found:
        ours, theirs = (
            f"layers {', '.join(map(str, layers))}, {heads} KV heads of {width}"
            for layers, heads, width in (ranked, found)
        )
        raise PipelineError(f"The policy ranks {ours}, but the model has {theirs}; train a policy for this model.")
    return dict(layout.windows)


def _require_places(places: Tensor, rotary: Mapping[str, Any]) -> None:
    """Raise where a model says that tokens it reads stand elsewhere than at these ``places``, (batch, tokens)."""
    sines = rotary.get("sin")
    if sines is None or sines.dim() != 3:
        return
    # A text begins at position 0, where no number is rotated; transformers puts pads there, too, or at 1.
    unrotated = (sines == 0).all(-1).expand(places.shape)
    if ((unrotated & (places > 0)) | (~unrotated & (places == 0))).any():
        raise PipelineError(
            "The model reads texts that begin elsewhere than the cache was told, or that have pads within them; where "
            "texts are filled up, on the left and before the first turn alone, give the cache their attention mask "
            "(KVPCache(..., attention_mask=inputs['attention_mask'])) and the model their position_ids, as generate "
            "does."
        )


class _RankedLayer(CacheLayerMixin):
    """The cache of a layer that attends to the whole context.

    Attributes
    ----------
    keys, values
        (batch, kv_heads, held, head_dim).
    positions
        (batch, kv_heads, held) int64, ascending: tokens before each, pads not counted; below 0 for pads.
    seen
        Tokens that were ever here, pads included.
    intact
        The last so many of them are all held.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor
    positions: Tensor

    def __init__(self, policy: Policy, layer: RankedLayer, options: _Options) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.policy, self.layer, self.options = policy, layer, options
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with nothing."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.policy.to(self.device)
        batch, pads, shape = len(key_states), self.options.pads, self.policy.shape
        ranked, found = (shape.kv_heads, shape.head_dim), (key_states.shape[1], key_states.shape[3])
        if ranked != found:
            ours, theirs = ("{} KV heads of dimension {}".format(*sizes) for sizes in (ranked, found))
            raise PipelineError(f"The policy ranks {ours}, but the model has {theirs}; train a policy for this model.")
        if pads is not None and len(pads) != batch:
            raise PipelineError(
                f"The attention mask is of {len(pads)} texts and the model reads {batch}; give the cache the mask of "
                "these texts, each row as often as there are beams or answers of it (repeat_interleave)."
            )
        self.pads = (torch.zeros(batch, dtype=torch.int64) if pads is None else pads).to(self.device)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.positions = torch.empty(self.keys.shape[:3], dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add tokens, evict where there are too many, and return all that these tokens attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        places = torch.arange(self.seen, self.seen + new, device=self.device) - self.pads[:, None]
        if new > 1 or not self.seen:  # tokens that are written one by one follow each other
            _require_places(places, cache_kwargs or {})
        keys = torch.cat([self.keys, key_states], dim=2)
        values = torch.cat([self.values, value_states], dim=2)
        positions = torch.cat([self.positions, places[:, None].expand(-1, keys.shape[1], -1)], dim=2)
        self.seen += new
        self.intact += new
        # One token at a time may pass the budget: ranking all of them again for each would take longer than the model.
        room = self.options.budget + (self.options.slack if new == 1 else 0)
        self.keys, self.values, self.positions = keys, values, positions
        if keys.shape[2] > room:
            self._evict()
        return keys, values

    @torch.no_grad()
    def _evict(self) -> None:
        options = self.options
        lengths = torch.full_like(self.pads, self.seen) - self.pads  # of each text
        texts = [
            CachedTokens(keys, values, positions, length.expand(1, self.held))
            for keys, values, positions, length in zip(self.keys, self.values, self.positions, lengths, strict=True)
        ]
        scores = torch.stack([self.policy.score(tokens, self.layer) for tokens in texts])
        pads = self.positions < 0
        ends = (self.positions < options.n_sink) | (self.positions >= (lengths - options.n_recent)[:, None, None])
        # Behind all tokens, as of two with one score the later comes first.
        scores = scores.float().masked_fill(pads, torch.finfo(torch.float32).min)
        kept = kept_tokens(rank_behind(ends & ~pads, scores), options.budget)
        self.keys, self.values = (gather_tokens(states, kept[None])[0] for states in (self.keys, self.values))
        self.positions = self.positions.gather(-1, kept)
        self.intact = options.n_recent

    def get_mask_sizes(self, cache_position: Tensor) -> tuple[int, int]:
        """How many tokens the new ones will attend to, themselves included, and how many before those there were."""
        held = self.held
        return held + cache_position.shape[0], self.seen - held

    def get_seq_length(self) -> int:
        """Tokens seen: where the next one stands."""
        return self.seen

    @property
    def held(self) -> int:
        """Tokens that each head holds."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def nbytes_of_all(self) -> int:
        """Bytes of the keys and values of all tokens seen."""
        if not self.is_initialized:
            return 0
        batch, kv_heads, _, width = self.keys.shape
        return batch * kv_heads * self.seen * (width + self.values.shape[3]) * self.keys.itemsize

    def get_max_cache_shape(self) -> int:
        """No text is too long."""
        return -1

    def crop(self, max_length: int) -> None:
        """Take the last tokens back, down to ``max_length`` seen, or so many where it is negative."""
        surplus = min(self.seen - max_length if max_length >= 0 else -max_length, self.seen)
        if surplus <= 0:
            return
        if surplus > self.intact and self.held < self.seen:
            raise PipelineError(
                f"{surplus} tokens cannot be taken back: only of the last {self.intact} it is certain that none was "
                "evicted; take back fewer, or read the text again."
            )
        self.keys, self.values, self.positions = (
            states[:, :, : self.held - surplus] for states in (self.keys, self.values, self.positions)
        )
        self.seen -= surplus
        self.intact -= surplus

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.positions = self.pads = torch.empty(0)
        self.is_initialized, self.seen, self.intact = False, 0, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows again in another order, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so often."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.pads)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows."""
        if self.is_initialized:
            chosen = indices.to(self.device)
            self.keys, self.values = self.keys[chosen], self.values[chosen]
            self.positions, self.pads = self.positions[chosen], self.pads[chosen]
