"""What an input of an agent is. It knows no agents and no training."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.registry import Registry


@dataclass(frozen=True)
class CachedTokens:
    """Some tokens of caches, in the view of some heads.

    Attributes
    ----------
    keys, values
        (heads, n, head_dim), any floating dtype, as they stand in the cache.
    positions
        (heads, n) or (1, n): how many tokens stand before each.
    cache_size
        (heads, n) or (1, n): how many tokens there are in its cache.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    cache_size: Tensor

    @classmethod
    def whole(cls, keys: Tensor, values: Tensor) -> "CachedTokens":
        """All tokens of one cache, which holds positions 0 .. n-1."""
        n = keys.shape[1]
        positions = torch.arange(n, device=keys.device)[None]
        return cls(keys, values, positions, torch.full_like(positions, n))

    def __getitem__(self, heads: slice) -> "CachedTokens":
        places = (place if len(place) == 1 else place[heads] for place in (self.positions, self.cache_size))
        return CachedTokens(self.keys[heads], self.values[heads], *places)


class AgentInput(ABC):
    """Some numbers about each cached token. No query, no attention, no later token: at run time there are none."""

    normalised: ClassVar[bool] = False
    """Whether each number is brought to mean 0 and standard deviation 1, as found in the training traces."""
    cached: ClassVar[bool] = True
    """Whether a cache holds it. What it does not hold is for studies alone."""

    @abstractmethod
    def width(self, head_dim: int) -> int:
        """How many numbers it is."""

    @abstractmethod
    def of(self, tokens: CachedTokens) -> Tensor:
        """The numbers of every token, (heads, n, width) or (1, n, width), of any floating dtype."""


INPUTS = Registry("pipeline.policy.inputs", AgentInput, "input of an agent")  # type: ignore[type-abstract]
