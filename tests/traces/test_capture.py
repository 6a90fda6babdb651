"""Captured attention against a float64 reference and against transformers' own attention."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from pipeline.errors import PipelineError
from pipeline.models.layers import full_attention_layers
from pipeline.traces.capture import Recorder, capture_attention, capture_sequence, recorded_attention, run_captured
from tests.conftest import FAMILIES, MakeModel


class Module(torch.nn.Module):
    layer_idx = 0


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, block: int):
    """Output and record by literal loops over heads, in float64."""
    heads, q_len, head_dim = query.shape
    kv_heads, tokens, _ = key.shape
    groups, offset = heads // kv_heads, tokens - q_len
    output = torch.zeros(q_len, heads, head_dim, dtype=torch.float64)
    record = torch.zeros(kv_heads, tokens, -(-tokens // block), dtype=torch.float64)
    for kv_head in range(kv_heads):
        for row in range(q_len):
            position = offset + row
            strongest = torch.zeros(tokens, dtype=torch.float64)
            for head in range(kv_head * groups, (kv_head + 1) * groups):
                logits = key[kv_head, : position + 1].double() @ query[head, row].double() * scaling
                weights = torch.softmax(logits, -1)
                output[row, head] = weights @ value[kv_head, : position + 1].double()
                strongest[: position + 1] = torch.maximum(strongest[: position + 1], weights)
            record[kv_head, :, position // block] += strongest
    return output, record


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    past=st.integers(0, 37),
    q_len=st.integers(1, 45),
    block=st.integers(1, 40),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_output_and_record_equal_the_reference(
    kv_heads: int, groups: int, past: int, q_len: int, block: int, chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = past + q_len
    query = torch.randn(1, kv_heads * groups, q_len, 8, generator=generator) * 2
    key, value = (torch.randn(1, kv_heads, tokens, 8, generator=generator) * 2 for _ in range(2))
    recorder = Recorder(block, chunk)  # blocks may be smaller or larger than chunks
    output, _ = capture_attention(Module(), query, key, value, None, scaling=0.35, recorder=recorder)
    expected_output, expected_record = reference(query[0], key[0], value[0], 0.35, block)
    torch.testing.assert_close(output[0].double(), expected_output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recorder.records[0].double(), expected_record, rtol=1e-4, atol=1e-6)


def textbook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, block: int):
    """Output and record as :func:`reference` defines them, without chunks, in the dtype of the query."""
    (heads, q_len, _), (kv_heads, tokens) = query.shape, key.shape[:2]
    keys, values = (states.repeat_interleave(heads // kv_heads, dim=0) for states in (key, value))
    hidden = torch.ones(q_len, tokens).triu(tokens - q_len + 1).bool()
    logits = (query @ keys.transpose(1, 2) * scaling).masked_fill(hidden, float("-inf"))
    weights = torch.softmax(logits, -1, dtype=torch.float32)
    strongest = weights.unflatten(0, (kv_heads, -1)).amax(1)
    record = torch.zeros(kv_heads, tokens, -(-tokens // block))
    for row in range(q_len):
        record[:, :, (tokens - q_len + row) // block] += strongest[:, row]
    return (weights.to(value.dtype) @ values).transpose(0, 1), record


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("past", [0, 21])
def test_half_precision_errs_no_more_than_the_textbook_does(dtype: torch.dtype, past: int) -> None:
    generator = torch.Generator().manual_seed(past)
    query = torch.randn(6, 150, 64, generator=generator).to(dtype) * 2
    key, value = (torch.randn(2, past + 150, 64, generator=generator).to(dtype) for _ in range(2))
    scaling = 0.15  # no power of two: scaling rounds
    output, record, _ = recorded_attention(query, key, value, scaling, Recorder(16, 32))
    ours = output.transpose(0, 1), record
    assert (output.dtype, record.dtype) == (dtype, torch.float32)
    for mine, naive, exact in zip(
        ours, textbook(query, key, value, scaling, 16), reference(query, key, value, scaling, 16), strict=True
    ):
        assert (mine - exact).norm() <= 2 * (naive - exact).norm()


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor held that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("tokens", [256, 512])
def test_memory_grows_with_tokens_times_chunk(tokens: int) -> None:
    query, key = torch.randn(6, tokens, 8), torch.randn(2, tokens, 8)
    with LargestTensor() as largest:
        recorded_attention(query, key, key, 0.3, Recorder(16, 32))
    assert largest.numel == 6 * 32 * tokens


def literal_record(attention: torch.Tensor, kv_heads: int, block: int) -> torch.Tensor:
    """The record of one layer by its definition, from attention weights (heads, queries, tokens)."""
    heads, queries, tokens = attention.shape
    record = torch.zeros(kv_heads, tokens, -(-queries // block), dtype=torch.float64)
    for kv_head in range(kv_heads):
        for query in range(queries):
            strongest = torch.zeros(tokens, dtype=torch.float64)
            for head in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
                strongest = torch.maximum(strongest, attention[head, query].double())
            record[kv_head, :, query // block] += strongest
    return record


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_capture_equals_a_float64_model(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    ids = torch.arange(70) * 31 % 128
    traces = capture_sequence(model, ids, block_size=16, query_chunk=32)
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    cache = DynamicCache(config=exact.config)
    with torch.no_grad():
        attentions = exact(ids[None], output_attentions=True, past_key_values=cache).attentions
    for number, trace in zip(full_attention_layers(model.config), traces, strict=True):
        expected = literal_record(attentions[number][0], model.config.num_key_value_heads, 16)
        torch.testing.assert_close(trace.record.double(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(trace.keys.double(), cache.layers[number].keys[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(trace.values.double(), cache.layers[number].values[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_continuation_sees_the_cache(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    ids = torch.arange(50) * 17 % 128
    whole = run_captured(model, ids, DynamicCache(), 8, 16)
    cache = DynamicCache()
    first = run_captured(model, ids[:30], cache, 8, 16)
    second = run_captured(model, ids[30:], cache, 8, 16)
    for complete, early, late in zip(whole, first, second, strict=True):
        together = late.clone()
        together[:, :30, :4] += early
        torch.testing.assert_close(together, complete, rtol=1e-4, atol=1e-5)


def test_the_attention_implementation_is_restored(make_model: MakeModel) -> None:
    model = make_model("llama")
    before = model.config._attn_implementation
    capture_sequence(model, torch.arange(20), 8, 8)
    assert model.config._attn_implementation == before


def test_batches_are_refused() -> None:
    query, key = torch.randn(2, 2, 3, 4), torch.randn(2, 1, 3, 4)
    with pytest.raises(PipelineError, match="one sequence at a time"):
        capture_attention(Module(), query, key, key, None, scaling=1.0, recorder=Recorder(2, 2))
