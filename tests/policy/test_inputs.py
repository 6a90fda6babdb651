"""What every input of an agent owes to the agents: as many numbers as it says, the same in every dtype."""

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.policy.inputs.base import INPUTS, AgentInput, CachedTokens

HEADS, N, HEAD_DIM = 3, 20, 8


def cached(dtype: torch.dtype = torch.float32) -> CachedTokens:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, HEADS, N, HEAD_DIM, generator=generator).half().to(dtype)
    return CachedTokens.whole(keys, values)


def make(name: str) -> AgentInput:
    return INPUTS.load(name)()


def test_the_folder_holds_the_paper_s_inputs() -> None:
    assert {"key", "value", "position", "age", "hidden"} <= set(INPUTS.names())
    with pytest.raises(PipelineError, match=f"'query' is no input of an agent; known: {', '.join(INPUTS.names())}"):
        INPUTS.load("query")
    # What a cache holds is what a policy can be used with.
    assert {name for name in INPUTS.names() if not make(name).cached} == {"hidden"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", INPUTS.names())
def test_it_is_as_wide_as_it_says(name: str, dtype: torch.dtype) -> None:
    entry = make(name)
    found = entry.of(cached(dtype))
    assert found.is_floating_point()
    assert found.shape in {(HEADS, N, entry.width(HEAD_DIM)), (1, N, entry.width(HEAD_DIM))}
    assert found.isfinite().all()
    # What is normalised has statistics for each head.
    assert not entry.normalised or found.shape[0] == HEADS


@pytest.mark.parametrize("name", INPUTS.names())
def test_half_precision_gives_the_same_numbers(name: str) -> None:
    # Both hold the same numbers: traces are float16, a model's cache may be float32.
    entry = make(name)
    half, single = (entry.of(cached(dtype)) for dtype in (torch.float16, torch.float32))
    assert torch.equal(half.float(), single.float())


@pytest.mark.parametrize("name", INPUTS.names())
def test_nothing_is_changed_in_place(name: str) -> None:
    tokens = cached()
    make(name).of(tokens)
    assert all(torch.equal(getattr(tokens, name), states) for name, states in vars(cached()).items())


@pytest.mark.parametrize("name", INPUTS.names())
def test_a_token_s_numbers_know_no_other_token_s_state(name: str) -> None:
    entry, tokens = make(name), cached()
    found = entry.of(tokens)
    keys, values = tokens.keys.clone(), tokens.values.clone()
    for states in (keys, values):
        states[:, 7] += 1
    difference = (
        (entry.of(CachedTokens.whole(keys, values)) - found).abs().reshape(-1, N, entry.width(HEAD_DIM)).amax((0, 2))
    )
    assert set(difference.nonzero().flatten().tolist()) <= {7}


def test_places_are_counted_from_both_ends() -> None:
    position, age = (make(name).of(cached())[0, :, 0] for name in ("position", "age"))
    torch.testing.assert_close(position, torch.log1p(torch.arange(N)) / 8)
    torch.testing.assert_close(age, position.flip(0))


@pytest.mark.parametrize("name", INPUTS.names())
def test_some_tokens_of_a_cache_have_the_numbers_that_they_have_among_all(name: str) -> None:
    entry, tokens = make(name), cached()
    chosen = torch.stack([torch.randperm(N)[:6].sort().values for _ in range(HEADS)])
    rows = torch.arange(HEADS)[:, None]
    some = CachedTokens(tokens.keys[rows, chosen], tokens.values[rows, chosen], chosen, torch.tensor([[N] * 6]))
    found, whole = entry.of(some), entry.of(tokens).expand(HEADS, N, -1)
    assert torch.equal(found.expand(HEADS, 6, -1), whole[rows, chosen])
    assert torch.equal(entry.of(some[1:2])[0], whole[1, chosen[1]])
