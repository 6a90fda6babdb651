"""REINFORCE with a leave-one-out baseline, as published (paper, Algorithm 1).

Rankings are drawn from the Plackett-Luce distribution of the scores. Shapes as in ``pipeline/policy/ranking.py``. It
knows no agents and no files.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.policy.estimators.base import Estimator
from pipeline.policy.ranking import optimal_total_cost, total_cost


class Rloo(Estimator):
    """``samples`` rankings of each cache; the paper's K."""

    samples: Annotated[int, Field(ge=2)]

    @property
    def rankings(self) -> int:
        """All of ``samples``."""
        return self.samples

    def loss(self, scores: Tensor, importance: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Estimator.loss`."""
        return rloo_loss(scores, importance, uniform)


def rloo_loss(scores: Tensor, importance: Tensor, uniform: Tensor) -> Tensor:
    """REINFORCE with a leave-one-out baseline (paper, Algorithm 1): (..., n), (..., n), (samples, ..., n) -> (...).

    One ranking is drawn from each sample of ``uniform`` (``sample_rankings``). Rewards are normalised by the
    best order's; advantages are standardised over the samples of each agent. The value is a
    surrogate: only its gradient means something.
    """
    with torch.no_grad():
        rankings = sample_rankings(scores, uniform)
        reward = -total_cost(importance, rankings) / optimal_total_cost(importance)  # (samples, ...)
        baseline = (reward.sum(0) - reward) / (len(reward) - 1)
        advantage = reward - baseline
        advantage = (advantage - advantage.mean(0)) / (advantage.std(0) + 1e-8)
    return -(advantage * log_probability(scores, rankings)).mean(0)


def sample_rankings(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw rankings from the Plackett-Luce distribution: (..., n), (samples, ..., n) -> (samples, ..., n).

    Gumbel-sort: argsort of score + Gumbel(0, 1) noise, descending (paper, section "Policy"). ``uniform`` is
    what ``torch.rand`` draws; the noise is made of it.
    """
    # rand is in [0, 1): move 0 to the smallest normal float32, so both logarithms are finite.
    gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float32).tiny)))
    return torch.argsort(scores.float() + gumbel, dim=-1, descending=True)


def log_probability(scores: Tensor, rankings: Tensor) -> Tensor:
    """Plackett-Luce log-probability: (..., n), (samples, ..., n) -> (samples, ...)."""
    ordered = scores.expand(rankings.shape).gather(-1, rankings)
    remaining = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    return (ordered - remaining).sum(-1)
