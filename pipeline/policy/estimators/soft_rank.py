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

from pipeline.policy.estimators.base import Estimator, Target
from pipeline.policy.ranking import rank

# Weight of a token that is not there: isotonic regression wants positive ones.
_NOTHING = 1e-12


class SoftRank(Estimator):
    """Regression of soft ranks onto true ranks."""

    def loss(self, scores: Tensor, target: Target, uniform: Tensor) -> Tensor:
        """See :meth:`Estimator.loss`; nothing is drawn. A surrogate: where tokens are sampled, so are the ranks."""
        return soft_rank_loss(scores, target.importance, target.count)


def soft_rank(scores: Tensor, count: Tensor, strength: float = 1.0) -> Tensor:
    """Soft 0-based ranks, the highest score first: (..., n), (..., n) -> (..., n), of the dtype of ``scores``.

    The Euclidean projection of ``-scores / strength`` onto the convex hull of all permutations of
    0 .. n-1 (Blondel et al., section 4). They are the ranks themselves where neighbouring scores differ by
    ``strength`` or more, and (n - 1) / 2 minus the centred scores where all scores are close. 1 is the strength
    that the authors' implementation has as default; the KVP paper states none.

    A token that stands for ``count`` is so many tokens of one score, and its rank the middle of theirs.
    """
    ranks: Tensor = _SoftRank.apply(scores, count, strength)  # type: ignore[no-untyped-call]
    return ranks


def soft_rank_loss(scores: Tensor, importance: Tensor, count: Tensor) -> Tensor:
    """Length-normalised mean squared error of the soft ranks: (..., n) three times -> (...).

    mean_i ((soft_rank_i - rank_i) / n)^2 over the tokens that the known ones stand for, with rank_i the rank of token i
    by importance, 0 = most important.
    """
    # What counts for several tokens has the importance of all of them together.
    ranking = rank(torch.where(count > 0, importance / count, -1))
    counts = count.gather(-1, ranking)
    true_ranks = torch.empty_like(counts).scatter_(-1, ranking, counts.cumsum(-1) - (counts + 1) / 2)
    tokens = count.sum(-1, keepdim=True).clamp_min(_NOTHING)
    return (count * ((soft_rank(scores, count) - true_ranks) / tokens).square()).sum(-1) / tokens[..., 0]


class _SoftRank(torch.autograd.Function):
    # With z = -scores / strength sorted descending, b the counts in that order and w the middle ranks, those of the
    # lowest scores first, the projection is z - v, v the isotonic regression of z - w with weights b (Blondel et al.,
    # section 5, for b = 1). v is constant on blocks, so the Jacobian of the projection is the identity minus the
    # weighted average over each block.
    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: Tensor, strength: float) -> Tensor:
        # Every command checks the section of every estimator; few need this.
        from scipy.optimize import isotonic_regression

        n = scores.shape[-1]
        # A token that is not there is one of the lowest score, and weighs next to nothing.
        lowest = torch.where(count > 0, scores, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0)
        scores, weights = torch.where(count > 0, scores, lowest), count.double().clamp_min(_NOTHING)
        ordered, order = torch.sort(-scores.double() / strength, dim=-1, descending=True)
        weights = weights.gather(-1, order)
        behind = weights.sum(-1, keepdim=True) - weights.cumsum(-1)
        excess = ordered - (behind + (weights - 1) / 2)
        fit = np.empty((scores.numel() // n, n))
        block = np.empty(fit.shape, dtype=np.int64)  # of each sorted token, numbered through all rows
        blocks = 0
        rows = zip(*(states.reshape(-1, n).cpu().numpy() for states in (excess, weights)), strict=True)
        for row, (values, weight) in enumerate(rows):
            solution = isotonic_regression(values, weights=weight, increasing=False)
            lengths = np.diff(solution.blocks)
            fit[row], block[row] = solution.x, np.repeat(np.arange(blocks, blocks + len(lengths)), lengths)
            blocks += len(lengths)
        ranks = torch.empty_like(ordered)
        ranks.scatter_(-1, order, ordered - torch.from_numpy(fit).to(ordered).view_as(ordered))
        ctx.save_for_backward(order, torch.from_numpy(block).to(order), weights)
        ctx.strength, ctx.blocks = strength, blocks
        return ranks.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        order, block, weights = ctx.saved_tensors
        index = block.flatten()
        ordered = upstream.gather(-1, order).double()
        sums, total = (
            ordered.new_zeros(ctx.blocks).index_add_(0, index, states.flatten()) for states in (ordered, weights)
        )
        projected = ordered - weights * (sums / total)[index].view_as(ordered)
        gradient = torch.empty_like(ordered).scatter_(-1, order, projected) / -ctx.strength
        return gradient.to(upstream.dtype), None, None
