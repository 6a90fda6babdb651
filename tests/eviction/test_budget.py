"""Protected rankings, budgets as prefixes, and gathering."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.eviction.budget import gather_tokens, kept_tokens, protected_ranking


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), n_sink=st.integers(0, 5), n_recent=st.integers(0, 8), seed=st.integers(0, 2**31))
def test_protected_tokens_survive_and_budgets_are_nested(n: int, n_sink: int, n_recent: int, seed: int) -> None:
    scores = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed))
    ranking = protected_ranking(scores, n_sink, n_recent)
    assert torch.equal(ranking.sort(-1).values, torch.arange(n).expand(2, 3, n))
    protected = set(range(min(n_sink, n))) | set(range(max(n - n_recent, 0), n))
    previous: set[int] = set()
    for budget in range(len(protected), n + 1):
        kept = kept_tokens(ranking, budget)[1, 2].tolist()
        assert kept == sorted(kept)
        assert protected <= set(kept)
        assert previous <= set(kept)
        previous = set(kept)
        others = sorted((scores[1, 2, token].item() for token in range(n) if token not in protected), reverse=True)
        chosen = sorted((scores[1, 2, token].item() for token in set(kept) - protected), reverse=True)
        assert chosen == others[: len(chosen)]


def test_gather_takes_each_heads_own_tokens() -> None:
    states = torch.randn(3, 10, 4)
    tokens = torch.stack([torch.randperm(10)[:5].sort().values for _ in range(6)]).view(2, 3, 5)
    gathered = gather_tokens(states, tokens)
    for policy in range(2):
        for head in range(3):
            assert torch.equal(gathered[policy, head], states[head, tokens[policy, head]])


def test_a_budget_above_the_cache_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"The budget 11 is larger than the cache of 10 tokens"):
        kept_tokens(torch.arange(10), 11)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(PipelineError, match="not finite"):
        protected_ranking(torch.tensor([0.0, float("nan"), 1.0]), 0, 0)
