"""What the rankings of a cache cost, head by head, on a grid of budgets. It knows tensors only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.policy.ranking import cost_at_budgets, rank, total_cost
from pipeline.tables import GRID, PolicyKey
from pipeline.traces.example import best_cost


@dataclass(frozen=True)
class Costs:
    """Cost of one policy's ranking at one cache size.

    Attributes
    ----------
    budgets
        (b,) the grid.
    cost, optimal
        (layers, kv_heads, b): importance of the evicted tokens, by the policy and by the best order.
    total, optimal_total
        (layers, kv_heads): summed over all budgets 1 .. cache_size - 1.
    """

    key: PolicyKey
    cache_size: int
    budgets: Tensor
    cost: Tensor
    optimal: Tensor
    total: Tensor
    optimal_total: Tensor


def ranking_costs(importance: Tensor, scores: Mapping[PolicyKey, Tensor]) -> Iterator[Costs]:
    """Cost of every policy's own order, before any token is protected, so that the oracle's is the best.

    Parameters
    ----------
    importance, scores
        (layers, kv_heads, n).
    """
    cache_size = importance.shape[-1]
    budgets = torch.tensor([cache_size * k // GRID for k in range(1, GRID)])
    optimal = cost_at_budgets(importance, rank(importance), budgets)
    optimal_total = best_cost(importance)
    for key, score in scores.items():
        ranking = rank(score)
        cost = cost_at_budgets(importance, ranking, budgets)
        yield Costs(key, cache_size, budgets, cost, optimal, total_cost(importance, ranking), optimal_total)
