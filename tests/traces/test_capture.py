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
from pipeline.traces import capture
from pipeline.traces.capture import Recorder, Tails, capture_attention, recorded_attention, run_captured
from tests.conftest import FAMILIES, MakeModel


class Module(torch.nn.Module):
    layer_idx = 0


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float):
    """Output (heads, q, head_dim), weights (heads, q, tokens) and their maximum over groups, by loops, in float64."""
    heads, q_len, head_dim = query.shape
    kv_heads, tokens, _ = key.shape
    groups, offset = heads // kv_heads, tokens - q_len
    output = torch.zeros(heads, q_len, head_dim, dtype=torch.float64)
    weights = torch.zeros(heads, q_len, tokens, dtype=torch.float64)
    for head in range(heads):
        for row in range(q_len):
            seen = slice(offset + row + 1)
            logits = key[head // groups, seen].double() @ query[head, row].double() * scaling
            weights[head, row, seen] = torch.softmax(logits, -1)
            output[head, row] = weights[head, row, seen] @ value[head // groups, seen].double()
    return output, weights, torch.stack([part.amax(0) for part in weights.split(groups)])


def importance_of(strongest: torch.Tensor, cut: int, offset: int) -> torch.Tensor:
    """The definition: what the first ``cut`` tokens get from the queries at or behind it, (kv_heads, cut)."""
    return strongest[:, max(0, cut - offset) :, :cut].sum(1)


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    past=st.just(0) | st.integers(0, 37),
    q_len=st.integers(1, 45),
    places=st.lists(st.floats(0, 1), max_size=3),
    queries=st.integers(0, 9),
    at_once=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
)
def test_output_importance_and_tails_equal_the_reference(
    kv_heads: int, groups: int, past: int, q_len: int, places: list[float], queries: int, at_once: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = past + q_len
    query = torch.randn(1, kv_heads * groups, q_len, 8, generator=generator) * 2
    key, value = (torch.randn(1, kv_heads, tokens, 8, generator=generator) * 2 for _ in range(2))
    cuts = tuple(1 + round(place * (tokens - 1)) for place in places)
    ends = tuple(cut for cut in cuts if cut - queries >= past)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "WEIGHTS_PER_CHUNK", {"cpu": at_once})
        seen: list[capture.ObservedLayer] = []
        recorder = Recorder(cuts, {}, Tails(ends, queries), seen.append)
        output, _ = capture_attention(Module(), query, key, value, None, scaling=0.35, recorder=recorder)
    expected, weights, strongest = reference(query[0], key[0], value[0], 0.35)
    torch.testing.assert_close(output[0].transpose(0, 1).double(), expected, rtol=1e-4, atol=1e-5)
    (layer,) = seen
    assert set(layer.importance) == set(cuts)
    for cut in cuts:
        torch.testing.assert_close(
            layer.importance[cut].double(), importance_of(strongest, cut, past), rtol=1e-4, atol=1e-6
        )
    for cut in ends:
        kept = weights[:, max(0, cut - queries) - past : cut - past, :cut]
        torch.testing.assert_close(layer.tails[cut].double(), kept, rtol=1e-4, atol=1e-6)


def textbook(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float):
    """Logits in the model's dtype, softmax in float32, as eager attention computes them."""
    groups, q_len = query.shape[0] // key.shape[0], query.shape[1]
    logits = (query @ key.repeat_interleave(groups, 0).transpose(1, 2)) * scaling
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu_(logits.shape[2] - q_len + 1)
    weights = torch.softmax(logits.float().masked_fill(hidden, float("-inf")), -1)
    strongest = torch.stack([part.amax(0) for part in weights.split(groups)])
    return weights.to(value.dtype) @ value.repeat_interleave(groups, 0), strongest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("past", [0, 21])
def test_half_precision_errs_no_more_than_the_textbook_does(dtype: torch.dtype, past: int) -> None:
    generator = torch.Generator().manual_seed(past)
    query = torch.randn(6, 150, 64, generator=generator).to(dtype) * 2
    key, value = (torch.randn(2, past + 150, 64, generator=generator).to(dtype) for _ in range(2))
    scaling, cut = 0.15, past + 60  # no power of two: scaling rounds
    output, importance, _ = recorded_attention(query, key, value, scaling, (cut,))
    assert (output.dtype, importance[cut].dtype) == (dtype, torch.float32)
    naive, exact = textbook(query, key, value, scaling), reference(query, key, value, scaling)
    assert (output.transpose(0, 1) - exact[0]).norm() <= 2 * (naive[0] - exact[0]).norm()
    true = importance_of(exact[2], cut, past)
    assert (importance[cut] - true).norm() <= 2 * (importance_of(naive[1], cut, past) - true).norm()


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
def test_memory_grows_with_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "WEIGHTS_PER_CHUNK", {"cpu": 3 * 16 * tokens})
    query, key = torch.randn(6, tokens, 8), torch.randn(2, tokens, 8)
    with LargestTensor() as largest:
        recorded_attention(query, key, key, 0.3, (tokens // 4, tokens // 2))
    # Sixteen queries of a KV head's three at once, and the output, whose head is as long.
    assert largest.numel == 6 * 8 * tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_capture_equals_a_float64_model(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    ids = torch.arange(70) * 31 % 128
    cache = DynamicCache()
    importance = run_captured(model, ids, cache, (30, 51))
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    exact_cache = DynamicCache(config=exact.config)
    with torch.no_grad():
        attentions = exact(ids[None], output_attentions=True, past_key_values=exact_cache).attentions
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for place, number in enumerate(full_attention_layers(model.config)):
        strongest = torch.stack([part.amax(0) for part in attentions[number][0].split(groups)])
        for cut in (30, 51):
            expected = importance_of(strongest, cut, 0)
            torch.testing.assert_close(importance[cut][place].double(), expected, rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(cache.layers[number].keys[0], exact_cache.layers[number].keys[0], strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)
        for ours, theirs in zip(cache.layers[number].values[0], exact_cache.layers[number].values[0], strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_continuation_sees_the_cache(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    ids = torch.arange(50) * 17 % 128
    cuts = (12, 30, 41)
    whole = run_captured(model, ids, DynamicCache(), cuts)
    cache = DynamicCache()
    first = run_captured(model, ids[:30], cache, cuts[:2])
    second = run_captured(model, ids[30:], cache, cuts)
    for cut in cuts:
        together = second[cut] + first.get(cut, 0)
        torch.testing.assert_close(together, whole[cut], rtol=1e-4, atol=1e-5)


def test_the_attention_implementation_is_restored(make_model: MakeModel) -> None:
    model = make_model("llama")
    before = model.config._attn_implementation
    run_captured(model, torch.arange(20), DynamicCache(), (8,))
    assert model.config._attn_implementation == before


def test_batches_are_refused() -> None:
    query, key = torch.randn(2, 2, 3, 4), torch.randn(2, 1, 3, 4)
    with pytest.raises(PipelineError, match="one sequence at a time"):
        capture_attention(Module(), query, key, key, None, scaling=1.0, recorder=Recorder(()))
