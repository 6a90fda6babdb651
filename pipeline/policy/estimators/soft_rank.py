"""The differentiable-sorting surrogate that the paper compares its estimators with (figure 5b).

Soft ranks of Blondel, Teboul, Berthet and Djolonga, "Fast Differentiable Sorting and Ranking" (ICML 2020,
arXiv 2002.08871), with the quadratic regulariser: the scores are projected onto the permutahedron of the
ranks 0 .. n-1, which sorting and isotonic regression do in O(n log n). Regression onto true ranks counts
every misplaced token alike, however little importance it carries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.policy.estimators.base import Estimator
from pipeline.policy.ranking import rank


class SoftRank(Estimator):
    """Regression of soft ranks onto true ranks."""

    def loss(self, scores: Tensor, importance: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Estimator.loss`; nothing is drawn."""
        return soft_rank_loss(scores, importance)


def soft_rank(scores: Tensor, strength: float = 1.0) -> Tensor:
    """Soft 0-based ranks, the highest score first: (..., n) -> (..., n), of the dtype of ``scores``.

    The Euclidean projection of ``-scores / strength`` onto the convex hull of all permutations of
    0 .. n-1 (Blondel et al., section 4). They are the ranks themselves where neighbouring scores differ by
    ``strength`` or more, and (n - 1) / 2 minus the centred scores where all scores are close. 1 is the strength
    that the authors' implementation has as default; the KVP paper states none.
    """
    ranks: Tensor = _SoftRank.apply(scores, strength)  # type: ignore[no-untyped-call]
    return ranks


def soft_rank_loss(scores: Tensor, importance: Tensor) -> Tensor:
    """Length-normalised mean squared error of the soft ranks: (..., n), (..., n) -> (...).

    mean_i ((soft_rank_i - rank_i) / n)^2, with rank_i the rank of token i by importance, 0 = most important.
    """
    n = scores.shape[-1]
    true_ranks = rank(importance).argsort(dim=-1).to(scores.dtype)
    return ((soft_rank(scores) - true_ranks) / n).square().mean(-1)


class _SoftRank(torch.autograd.Function):
    # With z = -scores / strength sorted descending and w = (n-1, .., 0), the projection is z - v, v the isotonic
    # regression of z - w (Blondel et al., section 5). v is constant on blocks, so the Jacobian of the
    # projection is the identity minus the average over each block.
    @staticmethod
    def forward(ctx: Any, scores: Tensor, strength: float) -> Tensor:
        # Every command checks the section of every estimator; few need this.
        from scipy.optimize import isotonic_regression

        n = scores.shape[-1]
        ordered, order = torch.sort(-scores.double() / strength, dim=-1, descending=True)
        excess = ordered - torch.arange(n - 1, -1, -1, dtype=torch.float64, device=scores.device)
        fit = np.empty((scores.numel() // n, n))
        block = np.empty(fit.shape, dtype=np.int64)  # of each sorted token, numbered through all rows
        blocks = 0
        for row, values in enumerate(excess.reshape(-1, n).cpu().numpy()):
            solution = isotonic_regression(values, increasing=False)
            lengths = np.diff(solution.blocks)
            fit[row], block[row] = solution.x, np.repeat(np.arange(blocks, blocks + len(lengths)), lengths)
            blocks += len(lengths)
        ranks = torch.empty_like(ordered)
        ranks.scatter_(-1, order, ordered - torch.from_numpy(fit).to(ordered).view_as(ordered))
        ctx.save_for_backward(order, torch.from_numpy(block).to(order))
        ctx.strength, ctx.blocks = strength, blocks
        return ranks.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        order, block = ctx.saved_tensors
        index = block.flatten()
        ordered = upstream.gather(-1, order)
        sums = ordered.new_zeros(ctx.blocks).index_add_(0, index, ordered.flatten())
        means = sums / index.bincount(minlength=ctx.blocks)
        projected = ordered - means[index].view_as(ordered)
        return torch.empty_like(upstream).scatter_(-1, order, projected) / -ctx.strength, None
