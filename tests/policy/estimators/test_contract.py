"""What every file of the folder owes to the training: a loss for each head, which is that head's own."""

import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.policy.estimators.base import ESTIMATORS, Estimator, Target
from pipeline.traces.example import best_cost

# The sections that have fields which must be given.
OPTIONS = {"rloo": {"samples": 3}}
HEADS, N = 4, 50


def make(name: str) -> Estimator:
    return ESTIMATORS.load(name)(**OPTIONS.get(name, {}))


def drawn(estimator: Estimator, heads: int = HEADS, n: int = N, seed: int = 2) -> Tensor:
    return torch.rand(estimator.rankings, heads, n, generator=torch.Generator().manual_seed(seed))


def problem(heads: int = HEADS, n: int = N) -> tuple[Tensor, Target]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(heads, n, generator=generator) * 3
    return scores.requires_grad_(), whole(torch.rand(heads, n, generator=generator) ** 3 + 1e-6)


def whole(importance: Tensor) -> Target:
    """All tokens are known."""
    return Target(importance, torch.ones_like(importance), best_cost(importance))


def gradient(estimator: Estimator, scores: Tensor, target: Target, uniform: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().requires_grad_()
    loss = estimator.loss(leaf, target, uniform)
    (found,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), found


def test_the_options_are_those_of_files_that_there_are() -> None:
    assert set(OPTIONS) <= set(ESTIMATORS.names())
    assert {"exact", "rloo", "soft_rank"} <= set(ESTIMATORS.names())
    with pytest.raises(PipelineError, match=f"'ppo' is no estimator; known: {', '.join(ESTIMATORS.names())}"):
        ESTIMATORS.load("ppo")


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_an_estimator_is_called_by_its_file(name: str) -> None:
    assert make(name).name == name


@pytest.mark.parametrize("n", [2, N])
@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_a_loss_and_a_finite_gradient_for_each_head(name: str, n: int) -> None:
    estimator = make(name)
    scores, target = problem(n=n)
    loss, found = gradient(estimator, scores, target, drawn(estimator, n=n))
    assert (loss.shape, loss.dtype) == ((HEADS,), torch.float32)
    assert loss.isfinite().all()
    assert found.isfinite().all()
    if n == N:
        assert (found.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_a_head_s_gradient_is_its_own(name: str) -> None:
    estimator = make(name)
    scores, target = problem()
    uniform = drawn(estimator)
    loss, found = gradient(estimator, scores, target, uniform)
    for head in range(HEADS):
        # Whatever the others score, and whatever matters to them and is drawn for them.
        others = [index for index in range(HEADS) if index != head]
        scores2, importance2, uniform2 = scores.detach().clone(), target.importance.clone(), uniform.clone()
        scores2[others] = scores2[others].flip(-1) * 2 + 1
        importance2[others] = importance2[others].flip(-1) * 5
        uniform2[:, others] = 1 - uniform2[:, others]
        changed, gradients = gradient(estimator, scores2, whole(importance2), uniform2)
        torch.testing.assert_close(changed[head], loss[head])
        torch.testing.assert_close(gradients[head], found[head])
        # Alone as among others.
        part = slice(head, head + 1)
        alone, own = gradient(estimator, scores[part], target[part], uniform[:, part])
        torch.testing.assert_close(alone, loss[part])
        torch.testing.assert_close(own, found[part])


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_what_is_drawn_decides_where_something_is_drawn(name: str) -> None:
    estimator = make(name)
    scores, target = problem()
    _, found = gradient(estimator, scores, target, drawn(estimator))
    _, again = gradient(estimator, scores, target, drawn(estimator))
    _, other = gradient(estimator, scores, target, drawn(estimator, seed=3))
    assert torch.equal(found, again)
    assert torch.equal(found, other) == (estimator.rankings == 0)
    assert estimator.rankings == OPTIONS.get(name, {}).get("samples", 0)
    for ranking in range(estimator.rankings):
        # Every ranking that it asks for counts.
        uniform = drawn(estimator)
        uniform[ranking] = uniform[ranking].flip(-1)
        assert not torch.equal(gradient(estimator, scores, target, uniform)[1], found)


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_following_the_gradient_puts_what_matters_first(name: str) -> None:
    estimator = make(name)
    importance = torch.tensor([[1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]])
    total = torch.zeros(1, 6)
    for seed in range(200 if estimator.rankings else 1):
        total += gradient(estimator, torch.zeros(1, 6), whole(importance), drawn(estimator, 1, 6, seed))[1]
    assert total[0, 0] < 0
    assert total[0, 1:].mean() > 0


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_several_caches_side_by_side_are_so_many_losses(name: str) -> None:
    estimator = make(name)
    scores, target = problem()
    uniform = drawn(estimator)
    loss, found = gradient(estimator, scores, target, uniform)
    shape = (2, HEADS // 2)
    folded = Target(target.importance.view(*shape, N), target.count.view(*shape, N), target.best_cost.view(shape))
    together, gradients = gradient(estimator, scores.view(*shape, N), folded, uniform.view(-1, *shape, N))
    torch.testing.assert_close(together.flatten(), loss)
    torch.testing.assert_close(gradients.view_as(found), found)


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_tokens_that_are_not_there_change_nothing(name: str) -> None:
    estimator = make(name)
    scores, target = problem()
    uniform = drawn(estimator)
    loss, found = gradient(estimator, scores, target, uniform)
    longer = [torch.nn.functional.pad(states, (0, 7)) for states in (target.importance, target.count, uniform)]
    filled = torch.cat([scores.detach(), torch.randn(HEADS, 7) * 3], dim=1)
    padded, gradients = gradient(estimator, filled, Target(longer[0], longer[1], target.best_cost), longer[2])
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(gradients[:, :N], found)
    assert gradients[:, N:].abs().max() < 1e-20


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_a_cache_of_which_no_token_is_known_teaches_nothing(name: str) -> None:
    estimator = make(name)
    for n in (1, 3):
        nothing = Target(torch.zeros(2, n), torch.zeros(2, n), torch.ones(2))
        loss, found = gradient(estimator, torch.randn(2, n), nothing, drawn(estimator, 2, n))
        assert not loss.any()
        assert not found.any()
