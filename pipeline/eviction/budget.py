"""From a ranking to a smaller cache: protect, keep a prefix, gather. It knows neither policies nor models."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.policy.ranking import rank
from pipeline.section import Budgets, PositiveInt, Section, Seed


class EvaluationParams(Section):
    """The sweep. ``budgets`` are absolute token counts per head, the protected tokens included."""

    budgets: Budgets
    n_sink: Annotated[int, Field(ge=0)]
    n_recent: PositiveInt
    seed: Seed

    @model_validator(mode="after")
    def _budgets_hold_the_protected(self) -> "EvaluationParams":
        if self.budgets[0] < self.n_sink + self.n_recent:
            raise ValueError(
                f"the smallest budget, {self.budgets[0]}, is below the {self.n_sink + self.n_recent} protected tokens"
            )
        return self


class AtBenchmark(Section):
    """How one benchmark is evaluated: ``benchmarks.<name>.evaluate``.

    Attributes
    ----------
    budgets
        In place of those of the evaluation section, for contexts of another length; None for those.
    shorter
        Of a context that is shorter than a budget: ``refuse`` it, or leave it ``whole`` there, as in benchmarks
        whose contexts differ much.
    """

    budgets: Budgets | None
    shorter: Literal["refuse", "whole"]


def protected_ranking(scores: Tensor, n_sink: int, n_recent: int) -> Tensor:
    """Rank a cache, best first, with the first ``n_sink`` and last ``n_recent`` tokens in front.

    Parameters
    ----------
    scores
        (..., n), higher = keep.

    Returns
    -------
    (..., n) int64 token indices. Any budget of at least n_sink + n_recent keeps the protected tokens
    (paper, section "Inference protocol", 2); every budget is a prefix of this one ranking.
    """
    n = scores.shape[-1]
    protected = torch.zeros(n, dtype=torch.bool, device=scores.device)
    protected[:n_sink] = True
    protected[max(n - n_recent, 0) :] = True
    return rank_behind(protected, scores)


def rank_behind(protected: Tensor, scores: Tensor) -> Tensor:
    """The same with the tokens in front for which ``protected`` holds, of a shape that broadcasts with ``scores``.

    Raises
    ------
    PipelineError
        A score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise PipelineError("A policy gave scores that are not finite; its checkpoint or the model's cache is damaged.")
    return rank(scores.float().masked_fill(protected, float("inf")))


def kept_tokens(ranking: Tensor, budget: int) -> Tensor:
    """The tokens that stay at ``budget``, in order of position: (..., n) -> (..., budget).

    Raises
    ------
    PipelineError
        The budget is larger than the cache.
    """
    n = ranking.shape[-1]
    if budget > n:
        raise PipelineError(f"The budget {budget} is larger than the cache of {n} tokens; lower evaluation.budgets.")
    return ranking[..., :budget].sort(dim=-1).values


def gather_tokens(states: Tensor, tokens: Tensor) -> Tensor:
    """Copy the given tokens out of keys or values.

    Parameters
    ----------
    states
        (..., n, head_dim).
    tokens
        (policies, ..., b): the same leading dimensions, behind one for as many choices as there are.

    Returns
    -------
    (policies, ..., b, head_dim)
    """
    n, head_dim = states.shape[-2:]
    vectors = states.reshape(-1, head_dim)
    first = torch.arange(0, len(vectors), n, device=states.device).view(*states.shape[:-2], 1)
    # Whole vectors are copied; gather would look up every number by itself, and takes 8 times as long on a CPU.
    return vectors.index_select(0, (tokens + first).flatten()).view(*tokens.shape, head_dim)
