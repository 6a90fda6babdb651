"""A batch holds what its examples hold: each known token once, with what it is worth, and little else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.policy.batches import make_batch
from pipeline.traces.draws import generator
from pipeline.traces.example import RankingExample

HEADS, HEAD_DIM = 3, 2


def example(seed: int, known: list[int]) -> RankingExample:
    """``known`` tokens of each head of a cache of 50, filled up with more than is needed."""
    draws = torch.Generator().manual_seed(seed)
    width = max(known) + seed % 2
    present = torch.arange(width) < torch.tensor(known)[:, None]
    keys, values = (torch.randn(2, HEADS, width, HEAD_DIM, generator=draws) * present[..., None]).half()
    positions = torch.rand(HEADS, 50, generator=draws).argsort(1)[:, :width].sort(1).values.int() * present
    importance, count = torch.rand(HEADS, width, generator=draws), 1 + torch.rand(HEADS, width, generator=draws)
    best = torch.rand(HEADS, generator=draws)
    return RankingExample(50 + seed, keys, values, positions, importance * present, count * present, best)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=HEADS, max_size=HEADS), min_size=1, max_size=4))
def test_each_known_token_is_scored_once_where_its_worth_is(known: list[list[int]]) -> None:
    examples = [example(seed, of_heads) for seed, of_heads in enumerate(known)]
    batch = make_batch(examples, 2, generator(0), "cpu")
    width = batch.target.count.shape[2]
    tokens = batch.tokens.keys.shape[1]
    assert tokens == max(sum(of_head) for of_head in zip(*known, strict=True))
    assert batch.uniform.shape == (2, HEADS, len(examples), width)
    # What an agent says of a token is here the token itself.
    scores = batch.placed(torch.arange(1.0, tokens + 1).expand(HEADS, -1), slice(None))
    for head in range(HEADS):
        assert len(set(batch.places[head].tolist())) == tokens
        for place, (of_heads, found) in enumerate(zip(known, examples, strict=True)):
            count = of_heads[head]
            torch.testing.assert_close(batch.target.count[head, place, :count], found.count[head, :count])
            assert not batch.target.count[head, place, count:].any()
            worth = (found.importance * found.count)[head, :count]
            torch.testing.assert_close(batch.target.importance[head, place, :count], worth)
            torch.testing.assert_close(batch.target.best_cost[head, place], found.best_cost[head])
            scored = scores[head, place, :count].long() - 1
            assert (scored >= 0).all()
            assert torch.equal(batch.tokens.keys[head, scored], found.keys[head, :count])
            assert torch.equal(batch.tokens.values[head, scored], found.values[head, :count])
            assert torch.equal(batch.tokens.positions[head, scored], found.positions[head, :count])
            assert (batch.tokens.cache_size[head, scored] == found.cache_size).all()


def test_gradients_reach_the_scores_of_the_heads_that_are_asked_for() -> None:
    batch = make_batch([example(0, [3, 5, 1]), example(1, [4, 1, 6])], 0, generator(0), "cpu")
    scores = torch.zeros(2, batch.tokens.keys.shape[1], requires_grad=True)
    weights = torch.rand(2, 2, 7, generator=generator(1))
    (batch.placed(scores, slice(1, 3)) * weights).sum().backward()
    assert scores.grad is not None
    expected = weights.flatten(1).gather(1, batch.places[1:])
    torch.testing.assert_close(scores.grad, expected)
