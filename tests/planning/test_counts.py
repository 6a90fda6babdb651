"""Counted bytes, FLOPs and memory against the code that they count."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from pipeline.evaluation.decode import EvictedCache
from pipeline.models.layout import cache_layout
from pipeline.planning.counts import (
    capture_memory,
    capture_work,
    decoded_bytes,
    evicted_bytes,
    example_bytes,
    policy_bytes,
    score_work,
    step_memory,
    step_work,
    training_flops,
)
from pipeline.planning.shapes import ModelShape
from pipeline.policy import agents
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, save_policy
from pipeline.policy.batches import make_batch
from pipeline.policy.estimators import exact
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.estimators.exact import NODES, Exact, expected_cost
from pipeline.policy.estimators.rloo import Rloo
from pipeline.policy.train import compute_gradients
from pipeline.traces import capture
from pipeline.traces.capture import run_captured
from pipeline.traces.example import RankingExample
from pipeline.traces.shards import ExampleReader, TraceShape
from tests.conftest import SIZES, MakeModel
from tests.traces.synthetic import random_cache, write_traces

TINY = ModelShape(3, 3, 6, 2, 16, 64, 96, 128)
AGENT = AgentParams(hidden_width=12, hidden_layers=2, inputs=("key", "value", "position", "age"))
POLICY = PolicyShape(TINY.layers, TINY.kv_heads, TINY.head_dim, AGENT)


def write(root: Path, shape: ModelShape, sizes: Sequence[int], tokens: int | None) -> TraceShape:
    """Traces of one sequence with a cache of each size."""
    traces = TraceShape("tiny", "corpus", tuple(range(shape.layers)), shape.kv_heads, shape.head_dim)
    write_traces(root, traces, {"train": [[random_cache(traces, size, size) for size in sizes]]}, tokens)
    return traces


@pytest.mark.parametrize(
    ("head_dim", "size", "tokens"),
    [(64, 950, None), (64, 1022, 128), (128, 1000, 120), (128, 4096, 120), (128, 4096, None), (96, 300, 100)],
)
def test_trace_files_are_as_large_as_counted(head_dim: int, size: int, tokens: int | None, tmp_path: Path) -> None:
    shape = ModelShape(1, 1, 2, 2, head_dim, 64, 96, 128)
    write(tmp_path, shape, [size] * 8, tokens)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))
    reader = ExampleReader(tmp_path, "train", cache_bytes=0)
    known = sum(int((reader.read(index).count > 0).sum()) for index in range(8)) / (8 * shape.heads)
    assert known == pytest.approx(tokens or size, rel=0.05)  # of each token it is drawn whether it is kept
    # How much a compressor takes off depends on the numbers: off these, up to a twelfth more than was seen.
    assert written <= 8 * example_bytes(shape, size, known) <= 1.12 * written


def test_decoded_examples_are_as_large_as_counted(tmp_path: Path) -> None:
    write(tmp_path, TINY, [45], None)
    example = ExampleReader(tmp_path, "train", cache_bytes=0).read(0)
    tensors = [value for value in vars(example).values() if isinstance(value, torch.Tensor)]
    assert decoded_bytes(TINY, 45) == sum(tensor.nbytes for tensor in tensors)


def test_a_policy_is_as_large_as_counted(tmp_path: Path) -> None:
    save_policy(tmp_path, Policy(POLICY), {})
    written = (tmp_path / "policy.safetensors").stat().st_size
    # The file begins with 8 bytes and a JSON header of less than a kilobyte.
    assert written - 1000 < policy_bytes(POLICY) < written


def test_evicted_caches_are_as_large_as_counted() -> None:
    policies, budgets, context, reserve = 3, (20, 40, 90), 70, 5
    cache = EvictedCache(reserve)
    for rows, kept in [(policies, 20), (policies, 40), (policies, context), (1, context)]:
        states = [torch.zeros(rows, TINY.kv_heads, kept - 1, TINY.head_dim) for _ in range(TINY.layers)]
        cache.add_group(states, states)
    assert evicted_bytes(TINY, policies, budgets, context, reserve, 4) == cache.nbytes


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made under it that are held at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return returned

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def chunks_of(monkeypatch: pytest.MonkeyPatch, weights: int) -> None:
    """Let capture hold so many attention weights at once."""
    monkeypatch.setattr(capture, "WEIGHTS_PER_CHUNK", {"cpu": weights})


@pytest.mark.parametrize(("tokens", "weights"), [(64, 3 * 64 * 16), (210, 3 * 210 * 30), (90, 1), (40, 1 << 19)])
def test_flops_of_a_capture_are_those_that_torch_counts(
    tokens: int, weights: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    cache_layout(model)  # asked once for each model
    chunks_of(monkeypatch, weights)
    with FlopCounterMode(display=False) as counter:
        run_captured(model, torch.arange(tokens) % SIZES["vocab_size"], DynamicCache(), (1,))
    # Recorded from the second query on.
    planned = capture_work(TINY, tokens, 4, recorded=1, accelerator=False).flops
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_what_is_not_recorded_moves_nothing_and_starts_no_chunks() -> None:
    def works(recorded: float) -> tuple[float, float, float]:
        work = capture_work(TINY, 2000, 2, recorded, accelerator=True)
        return work.flops, work.moved, work.kernels

    none, half, everything = works(0), works(0.5), works(1)
    assert all(less < more for less, more in zip(none, half, strict=True))
    assert half[0] < everything[0]
    assert half[1] < everything[1]
    # 512 queries at once: all 2,000, or those that half of the pairs are of, 586.
    assert everything[2] == none[2] + TINY.layers * 12 * 4
    assert half[2] == none[2] + TINY.layers * 12 * 2


@pytest.mark.parametrize(("tokens", "weights"), [(500, 3 * 500 * 40), (900, 3 * 900 * 40), (900, 3 * 900 * 200)])
def test_memory_of_a_capture_is_what_is_held_at_its_peak(
    tokens: int, weights: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    cache_layout(model)
    chunks_of(monkeypatch, weights)
    cuts = (tokens // 3, tokens // 2)
    with PeakMemory() as memory:
        run_captured(model, torch.arange(tokens) % SIZES["vocab_size"], DynamicCache(), cuts)
    parts = capture_memory(TINY, tokens, 4, len(cuts), accelerator=False)
    assert sum(parts.values()) - parts["weights"] == pytest.approx(memory.peak, rel=0.15)


def test_memory_of_a_capture_grows_with_tokens_alone() -> None:
    def total(tokens: int) -> int:
        return sum(capture_memory(TINY, tokens, 2, 2, accelerator=True).values()) - 2 * TINY.parameters

    assert total(64_000) <= 2.01 * total(32_000)


def test_flops_of_the_agents_are_those_that_torch_counts() -> None:
    tokens = 40
    policy = Policy(POLICY, torch.Generator().manual_seed(0))
    keys = torch.randn(POLICY.heads, tokens, TINY.head_dim)
    with FlopCounterMode(display=False) as scoring, torch.no_grad():
        policy(keys, keys)
    with FlopCounterMode(display=False) as training:
        policy(keys, keys).sum().backward()
    rows = POLICY.heads * tokens
    assert score_work(POLICY, tokens).agent_flops == scoring.get_total_flops()
    assert training_flops(POLICY) * rows == training.get_total_flops()


def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU add up pair by pair, as a GPU does."""
    monkeypatch.setattr(exact, "DIRECT_UP_TO", {"cpu": exact.DIRECT_UP_TO["cuda"]})


on_both = pytest.mark.parametrize("accelerator", [False, True])


@on_both
@pytest.mark.parametrize("estimator", [Exact(), Rloo(samples=4)], ids=lambda estimator: estimator.name)
def test_memory_of_a_step_is_what_is_held_at_its_peak(
    estimator: Estimator, accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(agents, "UNITS_PER_BLOCK", {"cpu": 2 * 600 * 12})
    monkeypatch.setattr("pipeline.planning.counts.UNITS_PER_BLOCK", dict.fromkeys(("cpu", "cuda"), 2 * 600 * 12))
    monkeypatch.setattr("pipeline.planning.counts.PAIRS_PER_BLOCK", {"cuda": exact.PAIRS_PER_BLOCK["cpu"]})
    policy = Policy(POLICY, torch.Generator().manual_seed(0))
    batch = make_batch([some_example(300), some_example(300)], estimator.rankings, torch.Generator(), "cpu")
    with PeakMemory() as memory:
        compute_gradients(policy, batch, estimator)
    parts = step_memory(POLICY, estimator, 2, 300, accelerator)
    # Agents and moments are there before, their gradients are not; the uniform numbers of all heads are.
    before = parts["agents, gradients, moments"] * 3 // 4 + 4 * estimator.rankings * POLICY.heads * 600
    assert sum(parts.values()) - before == pytest.approx(memory.peak, rel=0.2)


def some_example(tokens: int) -> RankingExample:
    draws = torch.Generator().manual_seed(tokens)
    keys, values = torch.randn(2, POLICY.heads, tokens, TINY.head_dim, generator=draws).half()
    importance = torch.rand(POLICY.heads, tokens, generator=draws)
    positions = torch.arange(tokens, dtype=torch.int32).expand(POLICY.heads, tokens)
    return RankingExample(
        tokens, keys, values, positions, importance, torch.ones_like(importance), importance.sum(-1) * tokens
    )


@on_both
def test_flops_of_a_step_are_those_that_torch_counts(accelerator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    policy = Policy(POLICY, torch.Generator().manual_seed(0))
    batch = make_batch([some_example(40), some_example(40)], 0, torch.Generator(), "cpu")
    with FlopCounterMode(display=False) as counter:
        compute_gradients(policy, batch, Exact())
    assert step_work(POLICY, Exact(), 2, 40, accelerator).agent_flops == counter.get_total_flops()


def test_flops_of_the_exact_estimator_are_those_that_torch_counts() -> None:
    tokens = 40
    by_grid, by_rankings = (step_work(POLICY, estimator, 1, tokens, False) for estimator in (Exact(), Rloo(samples=4)))
    scores = torch.rand(POLICY.heads, tokens, generator=torch.Generator().manual_seed(0))  # narrow: all on the grid
    with FlopCounterMode(display=False) as counter:
        expected_cost(scores, torch.ones_like(scores), torch.ones_like(scores))
    assert by_grid.agent_flops - by_rankings.agent_flops == counter.get_total_flops()
    assert by_grid.agent_flops - by_rankings.agent_flops == 2 * NODES**2 * POLICY.heads * tokens
