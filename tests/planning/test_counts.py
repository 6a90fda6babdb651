"""Counted bytes and FLOPs against the code that they count."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.evaluation.decode import EvictedCache
from pipeline.models.layout import cache_layout
from pipeline.planning.counts import (
    capture_memory,
    capture_work,
    decoded_bytes,
    evicted_bytes,
    policy_bytes,
    score_work,
    step_work,
    trace_bytes,
    training_flops,
)
from pipeline.planning.shapes import ModelShape
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, save_policy
from pipeline.policy.estimators.exact import NODES, Exact, expected_cost
from pipeline.policy.estimators.rloo import Rloo
from pipeline.traces.capture import LayerTrace, capture_sequence
from pipeline.traces.importance import TracesParams
from pipeline.traces.shards import TraceReader, TraceShape, write_manifest, write_shard
from tests.conftest import SIZES, MakeModel

TINY = ModelShape(3, 3, 6, 2, 16, 64, 96, 128)
AGENT = AgentParams(hidden_width=12, hidden_layers=2, inputs=("key", "value", "position", "age"))
POLICY = PolicyShape(TINY.layers, TINY.kv_heads, TINY.head_dim, AGENT)


def write_traces(root: Path, shape: TraceShape, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-tokens // shape.block_size)
    size = (shape.kv_heads, tokens)
    layers = [
        LayerTrace(
            torch.randn(*size, shape.head_dim, generator=generator),
            torch.randn(*size, shape.head_dim, generator=generator),
            torch.rand(*size, blocks, generator=generator),
        )
        for _ in range(shape.layers)
    ]
    write_shard(root, "train", 0, shape, [(0, "a", layers)])
    write_manifest(root, shape, {"train": 1})


@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 950), (64, 1022), (128, 1000), (128, 4096), (96, 300)])
def test_trace_files_are_as_large_as_counted(head_dim: int, tokens: int, tmp_path: Path) -> None:
    shape = ModelShape(1, 1, 2, 2, head_dim, 64, 96, 128)
    write_traces(tmp_path, TraceShape("tiny", "corpus", 1, 2, head_dim, 64), tokens)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))
    # Parquet's levels are run-length encoded, which depends on the lengths of the lists.
    assert trace_bytes(shape, tokens, 64) == pytest.approx(written, rel=0.01)


def test_decoded_traces_are_as_large_as_counted(tmp_path: Path) -> None:
    write_traces(tmp_path, TraceShape("tiny", "corpus", 3, 2, 16, 8), 45)
    tensors = TraceReader(tmp_path, "train", cache_bytes=0).read(0)
    assert decoded_bytes(TINY, 45, 8) == sum(tensor.nbytes for tensor in tensors)


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


@pytest.mark.parametrize(("tokens", "chunk"), [(64, 16), (70, 16), (9, 16)])
def test_flops_of_a_capture_are_those_that_torch_counts(tokens: int, chunk: int, make_model: MakeModel) -> None:
    model = make_model("llama")
    cache_layout(model)  # asked once for each model
    with FlopCounterMode(display=False) as counter:
        capture_sequence(model, torch.arange(tokens) % SIZES["vocab_size"], 8, chunk)
    traces = TracesParams(block_size=8, query_chunk=chunk, sequences_per_shard=1)
    assert capture_work(TINY, tokens, 4, traces).flops == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_memory_of_a_capture_grows_with_tokens_and_chunk() -> None:
    def chunk(tokens: int, query_chunk: int) -> int:
        traces = TracesParams(block_size=8, query_chunk=query_chunk, sequences_per_shard=1)
        return capture_memory(TINY, tokens, 4, traces)["one chunk of attention"]

    # logits and weights: 6 query heads x chunk x tokens x (4 + 4) bytes
    assert chunk(1000, 16) == 6 * 16 * 1000 * 8
    assert chunk(2000, 32) == 4 * chunk(1000, 16)
    assert chunk(10, 16) == 6 * 10 * 10 * 8


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


def test_a_step_is_a_mean_over_the_drawn_cache_sizes() -> None:
    # 45 tokens in blocks of 8 are cut at 8, 16, 24, 32 or 40.
    sizes = [8, 16, 24, 32, 40]
    rloo, exact = (step_work(POLICY, estimator, 45, 8) for estimator in (Rloo(samples=4), Exact()))
    rows = POLICY.heads * sum(sizes) / len(sizes)
    assert rloo.agent_flops == pytest.approx(training_flops(POLICY) * rows)
    assert exact.agent_flops - rloo.agent_flops == pytest.approx(2 * NODES**2 * rows)


def test_flops_of_the_exact_estimator_are_those_that_torch_counts() -> None:
    tokens = 40
    exact, rloo = (step_work(POLICY, estimator, tokens + 1, tokens) for estimator in (Exact(), Rloo(samples=4)))
    scores = torch.rand(POLICY.heads, tokens, generator=torch.Generator().manual_seed(0))  # narrow: all on the grid
    with FlopCounterMode(display=False) as counter:
        expected_cost(scores, torch.ones_like(scores))
    assert exact.agent_flops - rloo.agent_flops == counter.get_total_flops()
