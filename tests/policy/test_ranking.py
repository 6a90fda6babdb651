"""The reward, the sampler and the published gradient estimator against literal float64 references."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.policy.estimators.base import Target
from pipeline.policy.estimators.exact import expected_cost
from pipeline.policy.estimators.rloo import Rloo, leave_one_out, log_probability, sample_rankings
from pipeline.policy.ranking import cost_at_budgets, rank, total_cost
from pipeline.traces.example import best_cost


def random_problem(n: int, seed: int, heads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(heads, n, generator=generator, dtype=torch.float64)
    importance = torch.rand(heads, n, generator=generator, dtype=torch.float64) ** 3
    return scores, importance


def uniform(*size: int, seed: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def cost_by_loop(importance: list[float], order: list[int]) -> float:
    """Sum over budgets 1 .. n-1 of the importance of everything outside the kept prefix."""
    n = len(order)
    return sum(sum(importance[token] for token in order[budget:]) for budget in range(1, n))


def plackett_luce(scores: list[float], order: tuple[int, ...]) -> float:
    probability, remaining = 1.0, list(order)
    for token in order:
        probability *= math.exp(scores[token]) / sum(math.exp(scores[other]) for other in remaining)
        remaining.remove(token)
    return probability


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_total_cost_is_the_sum_over_budgets(n: int, seed: int) -> None:
    scores, importance = random_problem(n, seed)
    order = rank(scores)
    expected = cost_by_loop(importance[0].tolist(), order[0].tolist())
    assert total_cost(importance, order).item() == pytest.approx(expected, rel=1e-12)
    budgets = torch.arange(n + 1)
    by_budget = cost_at_budgets(importance, order, budgets)[0]
    assert by_budget[1:n].sum().item() == pytest.approx(expected, rel=1e-12)
    assert by_budget[n] == 0
    for budget in range(n + 1):
        assert by_budget[budget].item() == pytest.approx(
            sum(importance[0, token].item() for token in order[0, budget:].tolist()), rel=1e-12, abs=1e-15
        )


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_a_token_that_counts_for_several_costs_what_they_cost(n: int, seed: int) -> None:
    scores, importance = random_problem(n, seed)
    count = torch.randint(0, 4, (1, n), generator=torch.Generator().manual_seed(seed)).double()
    # Pairs of one token with itself are no pairs of the estimate.
    order = rank(scores)[0].tolist()
    expected = sum(
        count[0, one].item() * importance[0, other].item() * count[0, other].item()
        for place, other in enumerate(order)
        for one in order[:place]
    )
    assert total_cost(importance * count, rank(scores), count).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_no_order_is_cheaper_than_the_optimal_one(n: int, seed: int) -> None:
    _, importance = random_problem(n, seed)
    cheapest = min(cost_by_loop(importance[0].tolist(), list(order)) for order in itertools.permutations(range(n)))
    assert best_cost(importance).item() == pytest.approx(cheapest, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_log_probability_is_that_of_drawing_without_replacement(n: int, seed: int) -> None:
    scores, _ = random_problem(n, seed)
    orders = list(itertools.permutations(range(n)))
    probabilities = log_probability(scores[0], torch.tensor(orders), torch.ones(n, dtype=torch.bool)).exp()
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert probabilities.tolist() == pytest.approx([plackett_luce(scores[0].tolist(), order) for order in orders])


def test_average_of_many_rloo_gradients_points_along_the_exact_gradient() -> None:
    # Standardised advantages scale each step's gradient by 1 / std, so directions are compared; without
    # standardisation (next test) the estimator is unbiased.
    scores, importance = random_problem(12, seed=5)
    scores = scores.float().requires_grad_()
    importance = importance.float()
    target = Target(importance, torch.ones_like(importance), best_cost(importance))
    (exact,) = torch.autograd.grad(expected_cost(scores, importance, torch.ones_like(importance)).sum(), scores)
    total = torch.zeros_like(scores)
    for seed in range(400):
        loss = Rloo(samples=64).loss(scores, target, uniform(64, *scores.shape, seed=seed)).sum()
        (gradient,) = torch.autograd.grad(loss, scores)
        total += gradient
    assert torch.nn.functional.cosine_similarity(total, exact).item() > 0.995


def test_unstandardised_rloo_gradient_is_unbiased() -> None:
    scores, importance = random_problem(8, seed=6)
    scores, importance = scores.float().requires_grad_(), importance.float()
    (exact,) = torch.autograd.grad(expected_cost(scores, importance, torch.ones_like(importance)).sum(), scores)
    rankings = sample_rankings(scores.detach(), uniform(200_000, *scores.shape, seed=1))
    reward = -total_cost(importance, rankings)
    advantage = leave_one_out(reward)
    present = torch.ones_like(scores, dtype=torch.bool)
    loss = -(advantage * log_probability(scores, rankings, present)).mean(0).sum()
    (sampled,) = torch.autograd.grad(loss, scores)
    # Monte-Carlo error at 200k samples; a wrong sign, scale or baseline is off by 100%.
    assert (sampled - exact).norm() / exact.norm() < 0.02


def test_gumbel_sort_draws_from_plackett_luce() -> None:
    scores = torch.tensor([0.5, -1.0, 1.2, 0.0])
    samples = 200_000
    rankings = sample_rankings(scores, uniform(samples, 4, seed=2))
    codes, counts = torch.unique((rankings * torch.tensor([64, 16, 4, 1])).sum(-1), return_counts=True)
    observed = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    chi_squared = 0.0
    for order in itertools.permutations(range(4)):
        expected = samples * plackett_luce(scores.tolist(), order)
        code = sum(token * weight for token, weight in zip(order, (64, 16, 4, 1), strict=True))
        chi_squared += (observed.get(code, 0) - expected) ** 2 / expected
    # 23 degrees of freedom: the 99.9% point is 49.7.
    assert chi_squared < 49.7


def test_pairwise_precedence_is_a_sigmoid() -> None:
    scores = torch.tensor([0.3, -0.4, 1.0])
    rankings = sample_rankings(scores, uniform(100_000, 3, seed=3))
    ranks = rankings.argsort(-1)
    for first, second in itertools.permutations(range(3), 2):
        observed = (ranks[:, first] < ranks[:, second]).float().mean().item()
        assert observed == pytest.approx(torch.sigmoid(scores[first] - scores[second]).item(), abs=0.008)


def test_ties_keep_the_more_recent_token_first() -> None:
    assert rank(torch.tensor([1.0, 2.0, 1.0, 2.0])).tolist() == [3, 1, 2, 0]
    low_precision = torch.tensor([0.1, 0.1001], dtype=torch.bfloat16)
    assert rank(low_precision).tolist() == [1, 0]


def test_gumbel_noise_is_finite_at_the_edges_of_the_generator() -> None:
    # 0 is the smallest and 1 - 2^-24 the largest number that torch.rand draws: last and first, whatever is between.
    edges = torch.tensor([0.0, 1 - 2**-24, 0.5])
    assert sample_rankings(torch.zeros(3), edges[None]).tolist() == [[1, 2, 0]]
    rankings = sample_rankings(torch.zeros(2, 1000), uniform(50, 2, 1000, seed=0))
    assert (rankings.sort(-1).values == torch.arange(1000)).all()
