"""Importance from the block record against the definition, also through float16 storage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.policy.ranking import optimal_total_cost, rank, total_cost
from pipeline.traces.importance import (
    future_importance,
    pack_record,
    record_entries,
    record_lengths,
    unpack_record,
)


def causal_attention(n: int, seed: int, kv_heads: int = 2, groups: int = 3) -> torch.Tensor:
    """(kv_heads, groups, queries, keys) float64, post-softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(kv_heads, groups, n, n, generator=generator, dtype=torch.float64) * 3
    return torch.softmax(logits.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")), -1)


def block_record(attention: torch.Tensor, block: int) -> torch.Tensor:
    return torch.stack([rows.sum(1) for rows in attention.amax(1).split(block, dim=1)], dim=-1)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 60), block=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_importance_and_reward_equal_those_of_the_full_attention(n: int, block: int, seed: int) -> None:
    attention = causal_attention(n, seed)
    record = block_record(attention, block)
    stored = unpack_record(pack_record(record, block).half(), n, block)
    for cache_size in range(block, n, block):
        # By definition: maximum over the group's query heads, summed over the queries that follow.
        expected = attention[:, :, cache_size:, :cache_size].amax(1).sum(1)
        exact = future_importance(record, cache_size, block)
        torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-7)
        from_disk = future_importance(stored, cache_size, block).double()
        ranking = rank(torch.randn(2, cache_size, generator=torch.Generator().manual_seed(seed)))
        if cache_size > 1:
            for cost, reference in (
                (total_cost(from_disk, ranking), total_cost(expected, ranking)),
                (optimal_total_cost(from_disk), optimal_total_cost(expected)),
            ):
                torch.testing.assert_close(cost, reference, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("tokens", "block"), [(1, 4), (4, 4), (5, 4), (130, 64), (1000, 64)])
def test_packing_keeps_what_any_importance_needs(tokens: int, block: int) -> None:
    record = torch.rand(2, tokens, -(-tokens // block)) + 1
    packed = pack_record(record, block)
    assert packed.shape[-1] == record_lengths(tokens, block).sum() == record_entries(tokens, block)
    unpacked = unpack_record(packed, tokens, block)
    for cache_size in range(block, tokens, block):
        torch.testing.assert_close(
            future_importance(unpacked, cache_size, block), future_importance(record, cache_size, block)
        )


@pytest.mark.parametrize("cache_size", [0, 3, 6, 12])
def test_only_block_aligned_sizes_within_the_sequence_are_exact(cache_size: int) -> None:
    with pytest.raises(ValueError, match="no multiple"):
        future_importance(torch.zeros(1, 10, 3), cache_size, 4)
