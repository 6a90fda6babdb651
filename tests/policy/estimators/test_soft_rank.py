"""Soft ranks against their definition, a literal isotonic regression and published values; gradients by difference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.policy.estimators.soft_rank import soft_rank, soft_rank_loss


def make_scores(n: int, seed: int, spread: float, heads: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(heads, n, generator=generator, dtype=torch.float64)


def ranks_of(scores: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Where each token stands for itself."""
    return soft_rank(scores, torch.ones_like(scores), strength)


def soft_rank_by_loops(scores: list[float], strength: float) -> list[float]:
    """Isotonic regression by its min-max formula, one token after the other."""
    n = len(scores)
    order = sorted(range(n), key=lambda i: scores[i])  # -scores, descending
    ordered = [-scores[i] / strength for i in order]
    excess = [value - (n - 1 - place) for place, value in enumerate(ordered)]
    ranks = [0.0] * n
    for place, token in enumerate(order):
        fit = min(max(sum(excess[a : b + 1]) / (b + 1 - a) for b in range(place, n)) for a in range(place + 1))
        ranks[token] = ordered[place] - fit
    return ranks


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 6), seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_soft_ranks_are_the_projection_onto_the_permutahedron(n: int, seed: int, spread: float) -> None:
    scores = make_scores(n, seed, spread)
    ranks = ranks_of(scores, 0.7)[0]
    # Within the permutahedron (Rado): the ranks sum to that of 0 .. n-1, and no k of them to less than the lowest k.
    lowest = ranks.sort().values.cumsum(0)
    assert lowest[-1].item() == pytest.approx(n * (n - 1) / 2)
    assert (lowest - torch.arange(n).cumsum(0)).min().item() > -1e-9
    # A point is the projection of another if no vertex lies on the other's side of it.
    vertices = torch.tensor(list(itertools.permutations(range(n))), dtype=torch.float64)
    assert ((vertices - ranks) @ (-scores[0] / 0.7 - ranks)).max().item() < 1e-9


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 3.0, 20.0]))
def test_soft_ranks_of_many_heads_equal_the_loop_over_tokens(n: int, seed: int, spread: float) -> None:
    scores = make_scores(n, seed, spread, heads=3)
    for head, ranks in enumerate(ranks_of(scores, 0.5).tolist()):
        assert ranks == pytest.approx(soft_rank_by_loops(scores[head].tolist(), 0.5), abs=1e-9)


def test_published_example() -> None:
    # README of torchsort, whose ranks ascend from 1: tensor([[8., 1., 5., 4., 3., 2., 6., 7., 9.]]).
    scores = torch.tensor([[8.0, 0, 5, 3, 2, 1, 6, 7, 9]])
    torch.testing.assert_close(9 - ranks_of(scores), torch.tensor([[8.0, 1, 5, 4, 3, 2, 6, 7, 9]]))


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0, 500.0])
def test_gradients_equal_finite_differences(spread: float) -> None:
    scores = make_scores(12, 1, spread, heads=2).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    count, importance = 0.5 + 3 * torch.rand(2, 2, 12, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: soft_rank(s, count, 0.5), scores)
    assert torch.autograd.gradcheck(lambda s: soft_rank_loss(s, importance, count), scores)


def test_float32_is_as_good_as_its_input() -> None:
    scores = make_scores(1000, 0, 100.0, heads=4)
    torch.testing.assert_close(ranks_of(scores.float()).double(), ranks_of(scores), rtol=1e-5, atol=1e-3)


def test_the_loss_is_the_mean_squared_error_of_ranks_over_n() -> None:
    importance = torch.tensor([[0.3, 0.9, 0.1, 0.5]])
    scores = torch.tensor([[-100.0, -200.0, 100.0, 0.0]])  # far apart: soft ranks 2, 3, 0, 1; true ranks 2, 0, 3, 1
    one = torch.ones(1, 4)
    assert soft_rank_loss(scores, importance, one).tolist() == pytest.approx([(3**2 + 3**2) / 4**2 / 4])
    assert soft_rank_loss(100 * importance, importance, one).tolist() == pytest.approx([0.0])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 8), seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 3.0, 20.0]))
def test_a_token_that_counts_for_several_is_the_middle_of_so_many(n: int, seed: int, spread: float) -> None:
    scores = make_scores(n, seed, spread)
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(0, 5, (1, n), generator=generator).double()
    count[0, 0] = 1
    times = count[0].long()
    importance = torch.rand(1, n, generator=generator, dtype=torch.float64)
    repeated = scores.repeat_interleave(times, 1)
    ranks, found = ranks_of(repeated)[0].split(times.tolist()), soft_rank(scores, count)[0]
    for token, several in enumerate(ranks):
        if len(several):
            assert found[token].item() == pytest.approx(several.mean().item(), abs=1e-6)
    # And so is the regression, whose targets are then the middle of true ranks that are no ties.
    middles = torch.cat([several.mean().expand(len(several)) for several in ranks])
    true = repeated.new_tensor(
        [
            sum(times[other] for other in range(n) if importance[0, other] > importance[0, token])
            + (times[token] - 1) / 2
            for token in range(n)
        ]
    ).repeat_interleave(times)
    expected = ((middles - true) / len(true)).square().mean().item()
    assert soft_rank_loss(scores, importance * count, count).item() == pytest.approx(expected, abs=1e-6)
