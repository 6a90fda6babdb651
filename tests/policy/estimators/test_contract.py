"""What every file of the folder owes to the training: a loss for each head, which is that head's own."""

import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.policy.estimators.base import ESTIMATORS, Estimator

# The sections that have fields which must be given.
OPTIONS = {"rloo": {"samples": 3}}
HEADS, N = 4, 50


def make(name: str) -> Estimator:
    return ESTIMATORS.load(name)(**OPTIONS.get(name, {}))


def drawn(estimator: Estimator, heads: int = HEADS, n: int = N, seed: int = 2) -> Tensor:
    return torch.rand(estimator.rankings, heads, n, generator=torch.Generator().manual_seed(seed))


def problem(heads: int = HEADS, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(heads, n, generator=generator) * 3
    return scores.requires_grad_(), torch.rand(heads, n, generator=generator) ** 3 + 1e-6


def gradient(estimator: Estimator, scores: Tensor, importance: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().requires_grad_()
    loss = estimator.loss(leaf, importance, uniform)
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
    scores, importance = problem(n=n)
    loss, found = gradient(estimator, scores, importance, drawn(estimator, n=n))
    assert (loss.shape, loss.dtype) == ((HEADS,), torch.float32)
    assert loss.isfinite().all()
    assert found.isfinite().all()
    if n == N:
        assert (found.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_a_head_s_gradient_is_its_own(name: str) -> None:
    estimator = make(name)
    scores, importance = problem()
    uniform = drawn(estimator)
    loss, found = gradient(estimator, scores, importance, uniform)
    for head in range(HEADS):
        # Whatever the others score, and whatever matters to them and is drawn for them.
        others = [index for index in range(HEADS) if index != head]
        scores2, importance2, uniform2 = scores.detach().clone(), importance.clone(), uniform.clone()
        scores2[others] = scores2[others].flip(-1) * 2 + 1
        importance2[others] = importance2[others].flip(-1) * 5
        uniform2[:, others] = 1 - uniform2[:, others]
        changed, gradients = gradient(estimator, scores2, importance2, uniform2)
        torch.testing.assert_close(changed[head], loss[head])
        torch.testing.assert_close(gradients[head], found[head])
        # Alone as among others.
        part = slice(head, head + 1)
        alone, own = gradient(estimator, scores[part], importance[part], uniform[:, part])
        torch.testing.assert_close(alone, loss[part])
        torch.testing.assert_close(own, found[part])


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_what_is_drawn_decides_where_something_is_drawn(name: str) -> None:
    estimator = make(name)
    scores, importance = problem()
    _, found = gradient(estimator, scores, importance, drawn(estimator))
    _, again = gradient(estimator, scores, importance, drawn(estimator))
    _, other = gradient(estimator, scores, importance, drawn(estimator, seed=3))
    assert torch.equal(found, again)
    assert torch.equal(found, other) == (estimator.rankings == 0)
    assert estimator.rankings == OPTIONS.get(name, {}).get("samples", 0)
    for ranking in range(estimator.rankings):
        # Every ranking that it asks for counts.
        uniform = drawn(estimator)
        uniform[ranking] = uniform[ranking].flip(-1)
        assert not torch.equal(gradient(estimator, scores, importance, uniform)[1], found)


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_following_the_gradient_puts_what_matters_first(name: str) -> None:
    estimator = make(name)
    importance = torch.tensor([[1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]])
    total = torch.zeros(1, 6)
    for seed in range(200 if estimator.rankings else 1):
        total += gradient(estimator, torch.zeros(1, 6), importance, drawn(estimator, 1, 6, seed))[1]
    assert total[0, 0] < 0
    assert total[0, 1:].mean() > 0
