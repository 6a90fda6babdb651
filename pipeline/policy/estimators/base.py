"""What an estimator is: scores and importances to a loss whose gradient agents follow. It knows no agents, no files."""

from abc import ABC, abstractmethod

from torch import Tensor

from pipeline.registry import Registry
from pipeline.section import Section


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
    def loss(self, scores: Tensor, importance: Tensor, uniform: Tensor) -> Tensor:
        """The loss of some heads on one cache of n tokens.

        Parameters
        ----------
        scores, importance
            (heads, n): what the agents say, higher = keep, and the true future importance.
        uniform
            (rankings, heads, n) in [0, 1): what the rankings are drawn with.

        Returns
        -------
        (heads,). Each head's gradient is its own; the value of an estimator that samples means nothing.
        """


ESTIMATORS = Registry("pipeline.policy.estimators", Estimator, "estimator")  # type: ignore[type-abstract]
