"""Expected cost and its gradient: by definition, pair by pair, and through the grid within its bound."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.policy.estimators import exact as pairs
from pipeline.policy.estimators.exact import direct_sums, expected_cost, grid_error_bounds, grid_sums, pair_sums
from pipeline.policy.estimators.rloo import log_probability
from pipeline.policy.ranking import total_cost

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor]
SHAPES_OF_SCORES = ["normal", "constant", "ties", "clusters", "far apart", "on the nodes", "one outlier", "sorted"]


def problem(n: int, kind: str, spread: float, seed: int, heads: int = 2) -> Problem:
    """float32 scores of the given kind within about ``spread``, importances between 1e-10 and 1, counts from 0 to 8."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(heads, n, generator=generator)
    scores = {
        "normal": normal * spread / 6,
        "constant": torch.full((heads, n), spread),
        "ties": (normal * 2).round() * spread / 10,
        "clusters": torch.randint(0, 3, (heads, n), generator=generator) * spread / 3 + normal * 1e-4,
        "far apart": torch.randperm(n, generator=generator).expand(heads, n) * spread / n,
        "on the nodes": (normal * spread / 6 / pairs.SPACING).round() * pairs.SPACING,
        "one outlier": torch.cat([normal[:, 1:] * 0.1, torch.full((heads, 1), spread)], dim=1),
        "sorted": normal.sort().values * spread / 6,
    }[kind]
    importance = 10 ** (-10 * torch.rand(heads, n, generator=generator))
    count = torch.randint(0, 9, (heads, n), generator=generator).float()
    count[:, 0] = 1
    return scores.contiguous(), importance, count


def by_definition(scores: torch.Tensor, importance: torch.Tensor, count: torch.Tensor) -> Result:
    """Cost and gradient in float64 from the n x n matrix; the gradient is autograd's."""
    leaf = scores.double().requires_grad_()
    before = torch.sigmoid(leaf[:, :, None] - leaf[:, None, :])
    others = before * (1 - torch.eye(scores.shape[1], dtype=torch.float64))
    cost = ((others * count.double()[:, :, None]).sum(1) * importance.double()).sum(-1)
    (gradient,) = torch.autograd.grad(cost.sum(), leaf)
    return cost.detach(), gradient


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_expected_cost_and_gradient_equal_the_enumeration_of_permutations(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()
    importance = torch.rand(n, generator=generator, dtype=torch.float64) ** 3
    cost = expected_cost(scores[None], importance[None], torch.ones_like(importance[None]))
    (gradient,) = torch.autograd.grad(cost.sum(), scores)

    orders = torch.tensor(list(itertools.permutations(range(n))))
    enumerated = (
        log_probability(scores, orders, torch.ones(n, dtype=torch.bool)).exp() * total_cost(importance, orders)
    ).sum()
    (reference,) = torch.autograd.grad(enumerated, scores)
    assert cost.item() == pytest.approx(enumerated.item(), rel=1e-9)
    torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("at_once", [1, 700, 5000, 1 << 20])
def test_direct_sums_do_not_depend_on_the_block_size(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "PAIRS_PER_BLOCK", {"cpu": at_once})
    found = tuple(tensor.double() for tensor in problem(60, "normal", 6.0, seed=3, heads=5))
    cost, gradient = direct_sums(*found)
    expected_value, expected_gradient = by_definition(*found)
    torch.testing.assert_close(cost, expected_value)
    torch.testing.assert_close(gradient, expected_gradient)


@settings(max_examples=150, deadline=None)
@given(
    n=st.one_of(st.integers(1, 3), st.integers(4, 300)),
    kind=st.sampled_from(SHAPES_OF_SCORES),
    spread=st.sampled_from([0.0, 1e-6, 0.5, 7.3, 40.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_the_grid_errs_by_no_more_than_its_bound(n: int, kind: str, spread: float, seed: int) -> None:
    scores, importance, count = problem(n, kind, spread, seed)
    cost, gradient = grid_sums(scores.double(), importance.double(), count.double())
    expected_value, expected_gradient = by_definition(scores, importance, count)
    value_bound, slope_bound = grid_error_bounds()
    # What float64 adds when n numbers of this size are summed in any order is 1e5 times smaller than the bounds.
    total, tokens = importance.double().sum(-1), count.double().sum(-1)
    assert ((cost - expected_value).abs() <= tokens * total * (value_bound + n * 1e-16)).all()
    size = count * total[:, None] + importance * tokens[:, None]
    assert ((gradient - expected_gradient).abs() <= size * (slope_bound + n * 1e-16)).all()


def test_the_bounds_are_close_to_the_worst_pair() -> None:
    # Scores in the middle between nodes and differences where the derivatives are largest.
    offset = torch.arange(-80, 81, dtype=torch.float64)[:, None] * pairs.SPACING / 2
    scores = torch.cat([torch.zeros_like(offset), offset, torch.full_like(offset, -9.96875)], dim=1)
    importance = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).expand(len(offset), 3)
    count = torch.ones_like(scores)
    cost, gradient = grid_sums(scores, importance, count)
    expected_value, expected_gradient = by_definition(scores, importance, count)
    value_bound, slope_bound = grid_error_bounds()
    for error, bound in [(cost - expected_value, value_bound), (gradient - expected_gradient, slope_bound)]:
        assert bound / 20 < error.abs().max() < 3 * bound


def test_the_interpolation_constants_are_the_largest_over_the_cell() -> None:
    # What the proof says about u = 1/2, looked up on a fine mesh: the product and the Lebesgue function.
    places = torch.arange(1 - pairs.NODES // 2, 1 + pairs.NODES // 2, dtype=torch.float64)
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    gaps = u[:, None] - places
    basis = [
        torch.stack([gaps[:, j] / (places[m] - places[j]) for j in range(pairs.NODES) if j != m]).prod(0)
        for m in range(pairs.NODES)
    ]
    assert gaps.prod(1).abs().max().item() == pytest.approx(225 / 64)
    assert torch.stack(basis).abs().sum(0).max().item() == pytest.approx(89 / 64)
    power = pairs.NODES + 1
    series = sum(float(k) ** -power for k in range(1, 10_001, 2))
    expected = (1 + 89 / 64) * 225 / 64 * pairs.SPACING**pairs.NODES * 2 * series / math.pi**power
    assert expected <= grid_error_bounds()[0] <= expected * 1.001


@pytest.mark.parametrize("kind", SHAPES_OF_SCORES)
@pytest.mark.parametrize("n", [64, 1000])
def test_float32_through_the_grid_is_as_exact_as_pair_by_pair(n: int, kind: str) -> None:
    found = problem(n, kind, 20.0, seed=n, heads=4)
    for ours, direct, reference in zip(grid_sums(*found), direct_sums(*found), by_definition(*found), strict=True):
        # Twice the error of the plain float32 sums, or the rounding of the result itself where those are exact.
        unit = torch.finfo(torch.float32).eps * reference.abs().max()
        assert (ours - reference).abs().max() <= max(2 * (direct - reference).abs().max(), unit)


def test_each_head_goes_the_way_that_suits_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, importance, count = problem(200, "normal", 10.0, seed=0, heads=5)
    scores[1] *= 1000
    scores[3, 7] = 1e30
    seen: dict[str, list[int]] = {}
    for name, sums in [("grid_sums", grid_sums), ("direct_sums", direct_sums)]:

        def record(s: torch.Tensor, *weights: torch.Tensor, name: str = name, sums: object = sums) -> Result:
            seen[name] = [int((scores == row).all(1).nonzero()) for row in s]
            return sums(s, *weights)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(pairs, name, record)
    cost, gradient = pair_sums(scores, importance, count)
    assert seen == {"grid_sums": [0, 2, 4], "direct_sums": [1, 3]}
    expected_value, expected_gradient = by_definition(scores, importance, count)
    torch.testing.assert_close(cost.double(), expected_value, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


def test_blocks_of_heads_do_not_change_the_grid_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(tensor.double() for tensor in problem(50, "normal", 10.0, seed=1, heads=7))
    whole = grid_sums(*found)
    monkeypatch.setattr(pairs, "WEIGHTS_PER_BLOCK", {"cpu": 2 * 50 * pairs.NODES})
    for block, expected in zip(grid_sums(*found), whole, strict=True):
        torch.testing.assert_close(block, expected, rtol=1e-13, atol=1e-13)


def test_undefined_scores_stay_undefined() -> None:
    scores, importance, count = problem(100, "normal", 1.0, seed=0)
    scores[0, 3] = math.nan
    cost, gradient = pair_sums(scores, importance, count)
    assert cost.isnan().tolist() == [True, False]
    assert gradient[0].isnan().all()
    assert not gradient[1].isnan().any()
