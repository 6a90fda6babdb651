"""What a baseline is: its entry in params.yaml, what it is shown of a cache, and what it says of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from pipeline.models.layers import ModelLayer
from pipeline.registry import Registry
from pipeline.section import Section

OBSERVED_QUERIES = 64
"""Attention of so many last queries is what baselines may look at: the window of SnapKV's authors."""
SHORTEST_CACHE = 2
"""A window of one query before which there is one token."""


@dataclass(frozen=True)
class LayerCache:
    """One layer at the end of a prefill of n tokens, as a baseline sees it.

    Attributes
    ----------
    number
        The layer's number in the model.
    keys, values
        (kv_heads, n, head_dim), keys after RoPE.
    attention
        (heads, q, n) float32: attention of the last q = min(n, OBSERVED_QUERIES) queries; None for a baseline that
        is said not to look at it.
    seed
        Seed of this sample; random rankings differ between samples and layers.
    """

    number: ModelLayer
    keys: Tensor
    values: Tensor
    attention: Tensor | None
    seed: int


def press_scores(press: Any, cache: LayerCache) -> Tensor:
    """What a press of kvpress says of a cache: (kv_heads, n) float32, higher = keep.

    Presses are written for one compression ratio; their ``score`` is not. Scores are computed in float32, whatever the
    cache's dtype. Presses that look at attention get what the model computed (``pipeline/traces/capture.py``): kvpress
    itself would recompute queries, which it can for a few families only.
    """
    heads = cache.keys.shape[0] if cache.attention is None else cache.attention.shape[0]
    scores: Tensor = press.score(
        # What presses ask of a module and of its input: how many heads and tokens there are.
        SimpleNamespace(config=SimpleNamespace(num_attention_heads=heads)),
        cache.keys.new_empty(1, cache.keys.shape[1], 0),
        cache.keys[None].float(),
        cache.values[None].float(),
        None if cache.attention is None else cache.attention[None],
        {},
    )
    return scores[0].float()


class OwnBaseline(Section, ABC):
    """A baseline that a file of this folder defines; its fields are the ``options`` of its entry in params.yaml."""

    @abstractmethod
    def score(self, cache: LayerCache) -> Tensor:
        """(kv_heads, n) float32, higher = keep."""


OWN = Registry("pipeline.eviction.baselines", OwnBaseline, "baseline of ours")  # type: ignore[type-abstract]


class Baseline(Section):
    """``baselines.<name>``: either ``press``, a class of kvpress that scores tokens, or ``own``, a file of this folder.

    ``sees_attention`` says whether it looks at the attention of the last tokens, so also at the question.
    """

    press: str | None = None
    own: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    sees_attention: bool

    @model_validator(mode="after")
    def _one_of_both(self) -> "Baseline":
        if (self.press is None) == (self.own is None):
            raise ValueError("a baseline has either press or own")
        if self.own is not None and self.own not in OWN.names():
            raise ValueError(f"'{self.own}' is no {OWN.what}; known: {', '.join(OWN.names())}")
        return self
