"""REINFORCE with a leave-one-out baseline, as published (paper, Algorithm 1).

Rankings are drawn from the Plackett-Luce distribution of the scores. Shapes as in ``pipeline/policy/ranking.py``. It
knows no agents and no files.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.policy.estimators.base import Estimator, Target
from pipeline.policy.ranking import total_cost

# Below every score.
_ABSENT = -1e30


class Rloo(Estimator):
    """``samples`` rankings of each cache; the paper's K."""

    samples: Annotated[int, Field(ge=2)]

    @property
    def rankings(self) -> int:
        """All of ``samples``."""
        return self.samples

    def loss(self, scores: Tensor, target: Target, uniform: Tensor) -> Tensor:
        """See :meth:`Estimator.loss`."""
        present = target.count > 0
        # Tokens that are not there come last and change no probability. Finite, so that no gradient is undefined.
        scores = scores.masked_fill(~present, _ABSENT)
        with torch.no_grad():
            rankings = sample_rankings(scores, uniform)
            reward = -total_cost(target.importance, rankings, target.count) / target.best_cost  # (samples, heads, ...)
            advantage = standardise(leave_one_out(reward))
        return -(advantage * log_probability(scores, rankings, present)).mean(0)


def leave_one_out(reward: Tensor) -> Tensor:
    """Each sample's reward less the mean of the others: (samples, ...) -> (samples, ...)."""
    return reward - (reward.sum(0) - reward) / (len(reward) - 1)


def standardise(advantage: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the samples: (samples, ...) -> (samples, ...)."""
    return (advantage - advantage.mean(0)) / (advantage.std(0) + 1e-8)


def sample_rankings(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw rankings from the Plackett-Luce distribution: (..., n), (samples, ..., n) -> (samples, ..., n).

    Gumbel-sort: argsort of score + Gumbel(0, 1) noise, descending (paper, section "Policy"). ``uniform`` is
    what ``torch.rand`` draws; the noise is made of it.
    """
    # rand is in [0, 1): move 0 to the smallest normal float32, so both logarithms are finite.
    gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float32).tiny)))
    return torch.argsort(scores.float() + gumbel, dim=-1, descending=True)


def log_probability(scores: Tensor, rankings: Tensor, present: Tensor) -> Tensor:
    """Plackett-Luce log-probability: (..., n), (samples, ..., n) -> (samples, ...).

    Only of the tokens that are ``present`` (..., n); those that are not come last in every ranking.
    """
    ordered, known = (states.expand(rankings.shape).gather(-1, rankings) for states in (scores, present))
    remaining = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(known, ordered - remaining, 0).sum(-1)
