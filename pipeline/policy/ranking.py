"""Plackett-Luce rankings of a cache: cost of a ranking, sampling, and the published gradient estimator.

Shapes: ``scores`` and ``importance`` are (..., n), one value per cached token, higher scores = keep;
a ``ranking`` is (..., n) int64 token indices, best first. It knows no agents and no files; the exact
estimator is in ``pairs.py``.

Keeping the best b of a ranking evicts the tokens at 0-based ranks >= b. The cost at budget b is the
importance of the evicted tokens; summed over b = 1 .. n-1 it is sum_i rank_i * imp_i with 0-based
ranks (paper, section "Reward": R = -cost, linear in the ranks).
"""

import torch
from torch import Tensor


def rank(scores: Tensor) -> Tensor:
    """Sort tokens by descending float32 score; ties keep the more recent token first.

    Low-precision scores tie often, and an unspecified tie order would change the kept set between
    devices.
    """
    flipped = scores.float().flip(-1)
    order = torch.sort(flipped, dim=-1, descending=True, stable=True).indices
    return scores.shape[-1] - 1 - order


def total_cost(importance: Tensor, ranking: Tensor) -> Tensor:
    """Cost summed over all budgets 1 .. n-1: (..., n), (..., n) -> (...)."""
    ranks = torch.arange(ranking.shape[-1], device=ranking.device, dtype=importance.dtype)
    return (importance.expand(ranking.shape).gather(-1, ranking) * ranks).sum(-1)


def optimal_total_cost(importance: Tensor) -> Tensor:
    """Cost of the best order (importance, descending): (..., n) -> (...). The reward is normalised by it."""
    ranks = torch.arange(importance.shape[-1], device=importance.device, dtype=importance.dtype)
    return (importance.sort(dim=-1, descending=True).values * ranks).sum(-1)


def cost_at_budgets(importance: Tensor, ranking: Tensor, budgets: Tensor) -> Tensor:
    """Importance evicted at each budget: (..., n), (..., n), (b,) -> (..., b)."""
    ordered = importance.gather(-1, ranking)
    # Summed from the end: the small costs of large budgets keep their precision.
    evicted = ordered.flip(-1).cumsum(-1).flip(-1)
    evicted = torch.cat([evicted, evicted.new_zeros(*evicted.shape[:-1], 1)], dim=-1)
    return evicted[..., budgets]


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
