"""Rankings of a cache and what they cost.

Shapes: ``scores`` and ``importance`` are (..., n), one value per cached token, higher scores = keep;
a ``ranking`` is (..., n) int64 token indices, best first. It knows no agents and no files.

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


def total_cost(importance: Tensor, ranking: Tensor, count: Tensor | None = None) -> Tensor:
    """Cost summed over all budgets 1 .. n-1: (..., n), (..., n) -> (...).

    Where only a sample of the tokens is known, ``count`` (..., n) says how many each stands for
    (``pipeline/traces/example.py``) and ``importance`` is that of all of these together: ranks become their sums, and
    the cost an unbiased estimate.
    """
    if count is None:
        ranks = torch.arange(ranking.shape[-1], device=ranking.device, dtype=importance.dtype)
    else:
        counts = count.expand(ranking.shape).gather(-1, ranking)
        ranks = counts.cumsum(-1) - counts
    return (importance.expand(ranking.shape).gather(-1, ranking) * ranks).sum(-1)


def cost_at_budgets(importance: Tensor, ranking: Tensor, budgets: Tensor) -> Tensor:
    """Importance evicted at each budget: (..., n), (..., n), (b,) -> (..., b)."""
    ordered = importance.gather(-1, ranking)
    # Summed from the end: the small costs of large budgets keep their precision.
    evicted = ordered.flip(-1).cumsum(-1).flip(-1)
    evicted = torch.cat([evicted, evicted.new_zeros(*evicted.shape[:-1], 1)], dim=-1)
    return evicted[..., budgets]
