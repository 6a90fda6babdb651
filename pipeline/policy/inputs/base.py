"""What an input of an agent is. It knows no agents and no training."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from pipeline.registry import Registry


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
    def of(self, keys: Tensor, values: Tensor) -> Tensor:
        """The numbers of every token, (heads, n, width) or (n, width), of any floating dtype.

        ``keys`` and ``values`` are (heads, n, head_dim) as they stand in the cache, which holds positions 0 .. n-1.
        """


INPUTS = Registry("pipeline.policy.inputs", AgentInput, "input of an agent")  # type: ignore[type-abstract]
