"""Inclusion probabilities and the best cost by their definitions, and estimates from samples against all tokens."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.policy.estimators.exact import expected_cost
from pipeline.policy.estimators.rloo import leave_one_out, log_probability, sample_rankings
from pipeline.policy.ranking import total_cost
from pipeline.traces.example import best_cost, inclusion_probabilities


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), tokens=st.integers(2, 70), power=st.floats(0, 30), seed=st.integers(0, 2**31))
def test_probabilities_are_a_clipped_mixture_that_sums_to_the_sample(
    n: int, tokens: int, power: float, seed: int
) -> None:
    importance = torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) ** power + 1e-10
    found = inclusion_probabilities(importance, tokens)
    assert found.dtype == torch.float64
    if tokens >= n:
        assert (found == 1).all()
        return
    assert ((found > 0) & (found <= 1)).all()
    torch.testing.assert_close(found.sum(-1), torch.full((3,), tokens, dtype=torch.float64))
    mixture = 0.5 / n + 0.5 * importance.double() / importance.double().sum(-1, keepdim=True)
    for row, wanted in zip(found, mixture, strict=True):
        free = row < 1
        # What is below 1 is in proportion to the mixture, and what is 1 would be above it.
        scale = (row[free] / wanted[free]).mean()
        torch.testing.assert_close(row[free], scale * wanted[free])
        assert (scale * wanted[~free] >= 1 - 1e-9).all()


def test_all_tokens_are_certain_without_a_number() -> None:
    assert (inclusion_probabilities(torch.rand(2, 9), None) == 1).all()


def test_the_best_cost_is_that_of_the_best_of_all_orders() -> None:
    importance = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(6))))
    costs = total_cost(importance, orders)
    torch.testing.assert_close(best_cost(importance), costs.min())


def subsets(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Every sample of n tokens, (2^n, n) bool, and how likely it is, (2^n,)."""
    n = len(probability)
    known = torch.tensor(list(itertools.product([False, True], repeat=n)))
    return known, torch.where(known, probability, 1 - probability).prod(-1)


def test_cost_and_gradient_of_the_closed_form_are_unbiased_over_all_samples() -> None:
    generator = torch.Generator().manual_seed(1)
    n = 8
    scores = (torch.randn(n, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    importance = torch.rand(n, generator=generator, dtype=torch.float64) ** 3
    known, chance = subsets(inclusion_probabilities(importance, 3))
    count = known / inclusion_probabilities(importance, 3)
    estimates = expected_cost(scores.expand(len(known), n), importance * count, count)
    whole = expected_cost(scores[None], importance[None], torch.ones(1, n, dtype=torch.float64))
    torch.testing.assert_close((chance * estimates).sum(), whole[0])
    (ours,) = torch.autograd.grad((chance * estimates).sum(), scores)
    (all_tokens,) = torch.autograd.grad(whole.sum(), scores)
    torch.testing.assert_close(ours, all_tokens)
    # Without the weights it would not be so.
    plain = expected_cost(scores.expand(len(known), n), importance * known, known.double())
    assert ((chance * plain).sum() / whole[0] - 1).abs() > 0.3


def test_cost_and_gradient_of_sampled_rankings_are_unbiased_over_all_samples_and_orders() -> None:
    generator = torch.Generator().manual_seed(2)
    n = 5
    scores = torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()
    importance = torch.rand(n, generator=generator, dtype=torch.float64) ** 3
    probability = inclusion_probabilities(importance, 3)
    orders = torch.tensor(list(itertools.permutations(range(n))))
    everyone = torch.ones(n, dtype=torch.bool)

    def value(known: Tensor) -> Tensor:
        """Expected cost over all orders of the known tokens, differentiable in the scores."""
        count = known / probability
        # Orders in which absent tokens come last, so that each order of the known ones is there equally often.
        last = torch.stack([~known[order] for order in orders]).int()
        allowed = orders[(last.diff(dim=-1) >= 0).all(-1)]
        masked = scores.masked_fill(~known, -1e30)
        chances = log_probability(masked, allowed, known).exp()
        chances = chances / (len(allowed) / len({tuple(order[: int(known.sum())].tolist()) for order in allowed}))
        return (chances * total_cost(importance * count, allowed, count)).sum()

    known, chance = subsets(probability)
    mean = sum(share * value(part) for part, share in zip(known, chance, strict=True))
    chances = log_probability(scores, orders, everyone).exp()
    whole = (chances * total_cost(importance, orders)).sum()
    torch.testing.assert_close(chances.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(mean, whole)
    gradients = [torch.autograd.grad(cost, scores, retain_graph=True)[0] for cost in (mean, whole)]
    torch.testing.assert_close(*gradients)


def closed_form(scores: Tensor, importance: Tensor, count: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    leaf = scores.clone().requires_grad_()
    cost = expected_cost(leaf, importance, count)
    return cost.detach(), torch.autograd.grad(cost.sum(), leaf)[0]


def sampled(scores: Tensor, importance: Tensor, count: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """REINFORCE with a leave-one-out baseline, as ``Rloo`` before it standardises: mean cost and its gradient."""
    leaf = scores.clone().requires_grad_()
    present = count > 0
    masked = leaf.masked_fill(~present, -1e30)
    rankings = sample_rankings(masked.detach(), torch.rand(4, *scores.shape, generator=generator))
    costs = total_cost(importance, rankings, count)
    surrogate = (leave_one_out(costs) * log_probability(masked, rankings, present)).mean(0)
    return costs.mean(0), torch.autograd.grad(surrogate.sum(), leaf)[0]


@pytest.mark.parametrize("estimate", [closed_form, sampled])
def test_the_mean_over_many_samples_is_the_value_over_all_tokens(
    estimate: Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]],
) -> None:
    n, draws = 40, 20_000
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(n, generator=generator)
    importance = torch.rand(n, generator=generator) ** 4
    probability = inclusion_probabilities(importance, 12).float()
    count = (torch.rand(draws, n, generator=generator) < probability) / probability
    cost, gradient = estimate(scores.expand(draws, n), importance * count, count, generator)
    leaf = scores[None].double().requires_grad_()
    whole = expected_cost(leaf, importance[None].double(), torch.ones(1, n, dtype=torch.float64))
    (all_tokens,) = torch.autograd.grad(whole.sum(), leaf)
    for found, true in ((cost[:, None], whole.detach()[:, None]), (gradient, all_tokens)):
        error = found.double().std(0) / draws**0.5
        # 41 intervals: 4.5 standard errors are exceeded once in thousands of runs, and this is one of fixed draws.
        assert ((found.double().mean(0) - true).abs() <= 4.5 * error).all()
        assert (error < 0.2 * true.abs().mean()).all()  # the intervals say something
