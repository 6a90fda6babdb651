"""What is learned from: the tokens of one cache, or a sample of them, and what they are worth. It knows tensors only.

By Luce's choice axiom the order of some tokens under Plackett-Luce is Plackett-Luce with the same scores, so sums over
pairs of tokens can be estimated from a sample. Each token is in it independently of the others with a probability p;
it counts 1 / p tokens, and a pair 1 / (p p'): the estimates are unbiased (docs/METHOD.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A token that nobody looks at again may have an importance of 0; the floor keeps the best order's cost above 0.
SMALLEST_IMPORTANCE = 1e-10


@dataclass(frozen=True)
class RankingExample:
    """One cache of ``cache_size`` tokens in the view of some heads, of each of which m tokens are known.

    Heads with fewer tokens are filled up with zeros, whose ``count`` is 0.

    Attributes
    ----------
    keys, values
        (heads, m, head_dim) float16; keys after RoPE, as they stand in the cache.
    positions
        (heads, m) int32, ascending; 0 .. cache_size - 1.
    importance
        (heads, m) float32: future importance of each token (paper, section "Reward").
    count
        (heads, m) float32: how many tokens it stands for, 1 / p; 1 where all tokens are known.
    best_cost
        (heads,) float32: cost of the best order of all ``cache_size`` tokens, by which costs are divided.
    """

    cache_size: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    importance: Tensor
    count: Tensor
    best_cost: Tensor


def inclusion_probabilities(importance: Tensor, tokens: int | None) -> Tensor:
    """Of each token to be in the sample: (..., n) -> (..., n) float64, summing to ``tokens``; 1 where that is None.

    Half of a probability is the same for all tokens, half is in proportion to the importance, and none is above 1: what
    tokens have too much goes to the others in the same proportion.
    """
    n = importance.shape[-1]
    if tokens is None or tokens >= n:
        return torch.ones_like(importance, dtype=torch.float64)
    weights = importance.double()
    weights = 0.5 / n + 0.5 * weights / weights.sum(-1, keepdim=True)
    ordered = weights.sort(dim=-1, descending=True).values
    # With the k largest at 1, the others are scaled by (tokens - k) / (sum of the others): the smallest k that fits.
    rest = ordered.flip(-1).cumsum(-1).flip(-1)  # of each token and those after it
    scales = (tokens - torch.arange(n, dtype=torch.float64, device=weights.device)) / rest
    fits = scales * ordered <= 1
    fits[..., tokens - 1 :] = True  # one token of the sample left for the rest
    scale = scales.gather(-1, fits.int().argmax(-1, keepdim=True))
    return (scale * weights).clamp(max=1.0)


def best_cost(importance: Tensor) -> Tensor:
    """Cost of the best order (importance, descending), summed over all budgets 1 .. n-1: (..., n) -> (...).

    See ``pipeline/policy/ranking.py`` for the cost of any order.
    """
    ranks = torch.arange(importance.shape[-1], device=importance.device, dtype=importance.dtype)
    return (importance.sort(dim=-1, descending=True).values * ranks).sum(-1)
