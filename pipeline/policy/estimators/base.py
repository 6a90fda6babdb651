"""What an estimator is: scores and importances to a loss whose gradient agents follow. It knows no agents, no files."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from pipeline.registry import Registry
from pipeline.section import Section


@dataclass(frozen=True)
class Target:
    """What the known tokens of some caches are worth (``pipeline/traces/example.py``).

    Attributes
    ----------
    importance
        (heads, ..., m) float32: future importance of all the tokens that each stands for, its own times ``count``.
    count
        (heads, ..., m) float32: how many tokens it stands for; 0 where there is none.
    best_cost
        (heads, ...) float32: cost of the best order of all tokens of a cache, by which costs are divided.
    """

    importance: Tensor
    count: Tensor
    best_cost: Tensor

    def __getitem__(self, heads: slice) -> "Target":
        return Target(self.importance[heads], self.count[heads], self.best_cost[heads])


class Estimator(Section, ABC):
    """An estimator; its fields are its section ``estimators.<name>`` of params.yaml."""

    @property
    def name(self) -> str:
        """That of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def rankings(self) -> int:
        """How many rankings it draws for a step."""
        return 0

    @property
    def nodes(self) -> int:
        """How many nodes of a grid stand in for a score, where its sums over pairs go through one."""
        return 0

    @abstractmethod
    def loss(self, scores: Tensor, target: Target, uniform: Tensor) -> Tensor:
        """The loss of some heads on some caches.

        Parameters
        ----------
        scores
            (heads, ..., m): what the agents say of each known token, higher = keep.
        uniform
            (rankings, heads, ..., m) in [0, 1): what the rankings are drawn with.

        Returns
        -------
        (heads, ...). Each head's gradient is its own, and its mean over samples of the tokens is the gradient over all
        tokens, but for an estimator that is a surrogate; the value of one that draws rankings means nothing.
        """


ESTIMATORS = Registry("pipeline.policy.estimators", Estimator, "estimator")  # type: ignore[type-abstract]
