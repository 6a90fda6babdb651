"""The exact estimator: expected cost under Plackett-Luce and its gradient, sums over all pairs of tokens.

P(j before i) = sigmoid(s_j - s_i), so with importances a and counts b of the tokens (``Target``; b = 1 where all are
known) the expected total cost is ``E = sum_i a_i * sum_{j != i} b_j sigmoid(s_j - s_i)``, and since sigmoid' is even
``dE / ds_k = sum_i (a_i b_k - a_k b_i) * sigmoid'(s_k - s_i)``. Two ways to add them up: pair by pair
(``direct_sums``), and through a grid in time that grows like n (``grid_sums``), with a proven bound on the error.
Shapes: scores, importance and count are (heads, n). It knows no agents and draws nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.policy.estimators.base import Estimator, Target

# Numbers held at once by either way. On a CPU a block should stay in the cache (direct sums at n = 960 on two
# cores: 0.09 s for 90 heads against 0.18 s with a block of 2^24); a GPU wants enough of them to fill it.
PAIRS_PER_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26}
WEIGHTS_PER_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}
# The grid: distance of its nodes, and how many nodes around a score stand in for it.
SPACING, NODES = 1 / 16, 6
# The transform of a wider grid costs more than the pairs of a short cache, and memory would not be O(n).
NODES_PER_TOKEN = 2
# Up to so many tokens an accelerator adds up pair by pair: that is faster there (perf/expected_cost.py), and the host
# need not wait for the scores to see how wide a grid they need.
DIRECT_UP_TO = {"cuda": 8192}


class Exact(Estimator):
    """The expected cost itself, over that of the best order."""

    @property
    def nodes(self) -> int:
        """Those of :func:`grid_sums`."""
        return NODES

    def loss(self, scores: Tensor, target: Target, uniform: Tensor) -> Tensor:
        """See :meth:`Estimator.loss`; nothing is drawn."""
        return expected_cost(scores, target.importance, target.count) / target.best_cost


def expected_cost(scores: Tensor, importance: Tensor, count: Tensor) -> Tensor:
    """Exact expected total cost under Plackett-Luce: (..., n) three times -> (...).

    Its gradient with respect to ``scores`` is the exact policy gradient: no sampled ranking, no variance from one.
    float32 scores go through the grid, whose error is below their rounding (``grid_error_bounds``), unless a head's
    scores are spread over more than about ``NODES_PER_TOKEN * SPACING * n``. Such heads, float64, and what is short on
    an accelerator (``DIRECT_UP_TO``) are summed pair by pair.
    """
    cost: Tensor = _ExpectedCost.apply(  # type: ignore[no-untyped-call]
        scores.flatten(0, -2), importance.flatten(0, -2), count.flatten(0, -2)
    )
    return cost.view(scores.shape[:-1])


class _ExpectedCost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, importance: Tensor, count: Tensor) -> Tensor:
        cost, gradient = pair_sums(scores, importance, count)
        ctx.save_for_backward(gradient)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[:, None] * gradient, None, None


def pair_sums(scores: Tensor, importance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Expected cost (heads,) and its gradient (heads, n), each head in the way that suits it."""
    if scores.dtype == torch.float64 or scores.shape[1] <= DIRECT_UP_TO.get(scores.device.type, 0):
        return direct_sums(scores, importance, count)
    spread = (scores.amax(-1) - scores.amin(-1)).cpu()
    # Written so that a head with infinite or undefined scores is summed directly.
    on_grid = spread / SPACING + NODES <= NODES_PER_TOKEN * scores.shape[1]
    cost, gradient = torch.empty_like(scores[:, 0]), torch.empty_like(scores)
    for heads, sums in ((on_grid, grid_sums), (~on_grid, direct_sums)):
        if heads.any():
            chosen = heads.nonzero()[:, 0].to(scores.device)
            cost[chosen], gradient[chosen] = sums(scores[chosen], importance[chosen], count[chosen])
    return cost, gradient


def direct_sums(scores: Tensor, importance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Expected cost (heads,) and gradient (heads, n), pair by pair in blocks.

    O(n^2) time, O(n) memory besides one block, in the dtype of ``scores``.
    """
    heads, n = scores.shape
    pairs = PAIRS_PER_BLOCK.get(scores.device.type, 1 << 24)
    row_block = max(1, min(n, pairs // n))
    head_block = max(1, pairs // (n * row_block))
    # Half of every token's own part is taken off: the diagonal contributes sigmoid(0) = 1/2.
    cost = -0.5 * (importance * count).sum(-1)
    gradient = torch.empty_like(scores)
    weights = torch.stack([importance, count], dim=-1)  # (heads, n, 2)
    for first_head in range(0, heads, head_block):
        block = slice(first_head, first_head + head_block)
        for start in range(0, n, row_block):
            rows = slice(start, start + row_block)
            # before[k, i] = P(k before i) = sigmoid(s_k - s_i)
            before = (scores[block, rows, None] - scores[block, None, :]).sigmoid_()  # (heads, rows, n)
            before_rows = torch.bmm(before, importance[block, :, None])[..., 0]
            cost[block] += (before_rows * count[block, rows]).sum(1)
            slope = before.addcmul_(before, before, value=-1)  # sigma' = sigma * (1 - sigma)
            by_importance, by_count = torch.bmm(slope, weights[block]).unbind(-1)
            gradient[block, rows] = count[block, rows] * by_importance - importance[block, rows] * by_count
    return cost, gradient


def grid_sums(scores: Tensor, importance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Expected cost (heads,) and gradient (heads, n) through a uniform grid, within ``grid_error_bounds``.

    A sum over pairs of a smooth function of s_k - s_i is a convolution. Each token's weights are spread over the
    ``NODES`` grid nodes around its score by Lagrange interpolation, the nodes are convolved with the function by
    FFT, and the result is interpolated back at the scores. With G = spread of the scores / SPACING nodes:
    O(n + G log G) time and O(n + G) memory per head. Computed in float64, returned in the dtype of ``scores``.
    Sums that meet at a node are added in any order on a GPU, as everywhere in torch unless
    ``torch.use_deterministic_algorithms`` is set.
    """
    heads, n = scores.shape
    cost, gradient = torch.empty_like(scores[:, 0]), torch.empty_like(scores)
    head_block = max(1, WEIGHTS_PER_BLOCK.get(scores.device.type, 1 << 24) // (n * NODES))
    for first_head in range(0, heads, head_block):
        block = slice(first_head, first_head + head_block)
        cost[block], gradient[block] = _grid_block(
            scores[block].double(), importance[block].double(), count[block].double()
        )
    return cost, gradient


def _grid_block(scores: Tensor, importance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    heads, n = scores.shape
    points = (scores - scores.amin(-1, keepdim=True)) / SPACING
    first = points.floor()
    # Row i: what node i of the NODES around a point gets, as coefficients of the powers of its place between the
    # two in the middle, which are 0 and 1.
    places = torch.arange(1 - NODES // 2, 1 + NODES // 2, dtype=torch.float64)
    coefficients = torch.linalg.inv(torch.linalg.vander(places)).to(scores.device)
    parts = (torch.linalg.vander(points - first, N=NODES) @ coefficients).flatten(1)  # (heads, n * NODES)
    nodes = (first.long()[..., None] + torch.arange(NODES, device=scores.device)).flatten(1)
    size = int(nodes.max()) + 1
    mass = scores.new_zeros(2, heads, size)  # of importance, and of tokens
    for total, weight in zip(mass, (importance, count), strict=True):
        total.scatter_add_(1, nodes, parts * weight.repeat_interleave(NODES, dim=1))

    # Long enough that no distance between two nodes wraps around.
    length = 1 << (2 * size - 1).bit_length()
    distance = torch.fft.fftfreq(length, 1 / length, dtype=torch.float64, device=scores.device) * SPACING
    before = distance.sigmoid()
    transformed = torch.fft.rfft(mass, n=length)
    convolved = torch.fft.irfft(transformed[0] * torch.fft.rfft(before), n=length)[..., :size]
    cost = (mass[1] * convolved).sum(-1) - 0.5 * (importance * count).sum(-1)
    slopes = torch.fft.irfft(transformed * torch.fft.rfft(before * (1 - before)), n=length)[..., :size]
    by_importance, by_count = ((slope.gather(1, nodes) * parts).view(heads, n, NODES).sum(-1) for slope in slopes)
    return cost, count * by_importance - importance * by_count


def grid_error_bounds() -> tuple[float, float]:
    """How far the grid's sigmoid and sigmoid' are from the true ones, at most, for any two scores.

    The error of ``grid_sums`` is then at most ``sum_i a_i * sum_j b_j`` times the first for the cost, and
    ``b_k * sum_i a_i + a_k * sum_j b_j`` times the second for the gradient of token k, besides the rounding of float64.

    Proof. Let f(x - y) be either function, h the spacing, p = ``NODES``, an even number, u in [0, 1] the place of a
    score between the two nodes in the middle.

    - Interpolating f in one variable errs by at most ``max |f^(p)| / p! * h^p * max_u prod_m |u - m|`` over the p
      nodes m. In v = (u - 1/2)^2 the product is that of |v - (j + 1/2)^2| over j < p/2, largest at v = 0, so at
      u = 1/2: ``prod_j (j + 1/2)^2``.
    - sigmoid(z) = 1/2 + sum over odd k of 1 / (z - k pi i) (partial fractions), so for real z
      ``|sigmoid^(p)| / p! <= sum_k |k pi|^-(p+1) = 2 L(p+1) / pi^(p+1)`` with ``L(q) = 1 + 3^-q + 5^-q + ...``, and
      ``|sigmoid'^(p)| / p! <= (p + 1) * 2 L(p+2) / pi^(p+2)``. L(q) <= 1 + 3^-q * (1 + 3 / (2 (q - 1))), by
      comparing the terms from 5 on with an integral.
    - Interpolating in y what was interpolated in x adds at most the same error times ``max_u sum_m |l_m(u)|``, l_m
      the Lagrange polynomials. It is largest at u = 1/2: for p = 6 it equals
      ``1 - (v - 1/4) + (v - 1/4) (v - 9/4) / 4``, which falls with v up to 1/4, from 89/64.
    """
    places = [m - 0.5 for m in range(1 - NODES // 2, 1 + NODES // 2)]  # of the nodes, seen from u = 1/2
    product = math.prod(abs(place) for place in places)
    lebesgue = sum(math.prod(abs(other / (other - place)) for other in places if other != place) for place in places)

    def bound(power: int, factor: int) -> float:
        tail = 3.0**-power * (1 + 3 / (2 * (power - 1)))
        return (1 + lebesgue) * factor * 2 * (1 + tail) / math.pi**power * SPACING**NODES * product

    return bound(NODES + 1, 1), bound(NODES + 2, NODES + 1)
