"""Plackett-Luce rankings of a cache: cost of a ranking, sampling, and the two gradient estimators.

Shapes: ``scores`` and ``importance`` are (..., n), one value per cached token, higher scores = keep;
a ``ranking`` is (..., n) int64 token indices, best first. It knows no agents and no files.

Keeping the best b of a ranking evicts the tokens at 0-based ranks >= b. The cost at budget b is the
importance of the evicted tokens; summed over b = 1 .. n-1 it is sum_i rank_i * imp_i with 0-based
ranks (paper, section "Reward": R = -cost, linear in the ranks).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def sample_rankings(scores: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Draw rankings from the Plackett-Luce distribution: (..., n) -> (samples, ..., n).

    Gumbel-sort: argsort of score + Gumbel(0, 1) noise, descending (paper, section "Policy").
    """
    uniform = torch.rand(samples, *scores.shape, generator=generator, device=scores.device)
    # rand is in [0, 1): move 0 to the smallest normal float32, so both logarithms are finite.
    gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float32).tiny)))
    return torch.argsort(scores.float() + gumbel, dim=-1, descending=True)


def log_probability(scores: Tensor, rankings: Tensor) -> Tensor:
    """Plackett-Luce log-probability: (..., n), (samples, ..., n) -> (samples, ...)."""
    ordered = scores.expand(rankings.shape).gather(-1, rankings)
    remaining = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    return (ordered - remaining).sum(-1)


def rloo_loss(scores: Tensor, importance: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """REINFORCE with a leave-one-out baseline (paper, Algorithm 1): (..., n), (..., n) -> (...).

    Rewards are normalised by the best order's; advantages are standardised over the samples of each
    agent. The value is a surrogate: only its gradient means something.
    """
    with torch.no_grad():
        rankings = sample_rankings(scores, samples, generator)
        reward = -total_cost(importance, rankings) / optimal_total_cost(importance)  # (samples, ...)
        baseline = (reward.sum(0) - reward) / (samples - 1)
        advantage = reward - baseline
        advantage = (advantage - advantage.mean(0)) / (advantage.std(0) + 1e-8)
    return -(advantage * log_probability(scores, rankings)).mean(0)


def expected_cost(scores: Tensor, importance: Tensor) -> Tensor:
    """Exact expected total cost under Plackett-Luce: (heads, n), (heads, n) -> (heads,).

    P(j before i) = sigmoid(s_j - s_i), so E[rank_i] = sum over j != i of sigmoid(s_j - s_i), and
    E[cost] = sum_i imp_i * E[rank_i]. Its gradient is the exact policy gradient: no sampling, no
    variance. Computed in blocks of pairs: O(n^2) time, O(n) memory besides one block.
    """
    cost: Tensor = _ExpectedCost.apply(scores, importance)  # type: ignore[no-untyped-call]
    return cost


# Pairs held at once. On a CPU the block should stay in the cache (measured at n = 960 on two cores: 0.09 s
# for 90 heads against 0.18 s with a block of 2^24); a GPU wants enough of them to fill it.
PAIRS_PER_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}


class _ExpectedCost(torch.autograd.Function):
    # d E[cost] / d s_k = sum_i (imp_i - imp_k) * sigma'(s_k - s_i): sigma' is even, so one pass over the
    # pairs yields the value and, with two weighted row sums, the gradient.
    @staticmethod
    def forward(ctx: Any, scores: Tensor, importance: Tensor) -> Tensor:
        heads, n = scores.shape
        pairs = PAIRS_PER_BLOCK.get(scores.device.type, 1 << 24)
        row_block = max(1, min(n, pairs // n))
        head_block = max(1, pairs // (n * row_block))
        # Half of every token's own importance is taken off: the diagonal contributes sigmoid(0) = 1/2.
        cost = -0.5 * importance.sum(-1)
        gradient = torch.empty_like(scores)
        weights = torch.stack([importance, torch.ones_like(importance)], dim=-1)  # (heads, n, 2)
        for first_head in range(0, heads, head_block):
            block = slice(first_head, first_head + head_block)
            for start in range(0, n, row_block):
                rows = slice(start, start + row_block)
                # before[k, i] = P(k before i) = sigmoid(s_k - s_i)
                before = (scores[block, rows, None] - scores[block, None, :]).sigmoid_()  # (heads, rows, n)
                cost[block] += torch.bmm(before, importance[block, :, None]).sum((1, 2))
                slope = before.addcmul_(before, before, value=-1)  # sigma' = sigma * (1 - sigma)
                by_importance, by_one = torch.bmm(slope, weights[block]).unbind(-1)
                gradient[block, rows] = by_importance - importance[block, rows] * by_one
        ctx.save_for_backward(gradient)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[:, None] * gradient, None
