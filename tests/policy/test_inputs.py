"""What every input of an agent owes to the agents: as many numbers as it says, the same in every dtype."""

import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.policy.inputs.base import INPUTS, AgentInput

HEADS, N, HEAD_DIM = 3, 20, 8


def states(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, HEADS, N, HEAD_DIM, generator=generator).half()
    return keys.to(dtype), values.to(dtype)


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
    entry, (keys, values) = make(name), states(dtype)
    found = entry.of(keys, values)
    assert found.is_floating_point()
    assert found.shape in {(HEADS, N, entry.width(HEAD_DIM)), (N, entry.width(HEAD_DIM))}
    assert found.isfinite().all()
    # What is normalised has statistics for each head.
    assert not entry.normalised or found.shape[0] == HEADS


@pytest.mark.parametrize("name", INPUTS.names())
def test_half_precision_gives_the_same_numbers(name: str) -> None:
    # Both hold the same numbers: traces are float16, a model's cache may be float32.
    entry = make(name)
    half, single = (entry.of(*states(dtype)) for dtype in (torch.float16, torch.float32))
    assert torch.equal(half.float(), single.float())


@pytest.mark.parametrize("name", INPUTS.names())
def test_nothing_is_changed_in_place(name: str) -> None:
    keys, values = states()
    make(name).of(keys, values)
    assert all(torch.equal(one, other) for one, other in zip((keys, values), states(), strict=True))


@pytest.mark.parametrize("name", INPUTS.names())
def test_a_token_s_numbers_know_no_other_token_s_state(name: str) -> None:
    entry, (keys, values) = make(name), states()
    found = entry.of(keys, values)
    changed = [state.clone() for state in (keys, values)]
    for state in changed:
        state[:, 7] += 1
    difference = (entry.of(*changed) - found).abs().reshape(-1, N, entry.width(HEAD_DIM)).amax((0, 2))
    assert set(difference.nonzero().flatten().tolist()) <= {7}


def test_places_are_counted_from_both_ends() -> None:
    position, age = (make(name).of(*states())[:, 0] for name in ("position", "age"))
    torch.testing.assert_close(position, torch.log1p(torch.arange(N)) / 8)
    torch.testing.assert_close(age, position.flip(0))
