"""The paper's training: 112 agents (28 layers x 4 KV heads, head_dim 128), sequences of 4,500 tokens, 4,000 steps.

    python -m perf.paper_training

Runs ``train_policy`` on random traces in memory, or on those of ``--traces``, for a few steps after a warm-up and
projects 4,000 of them; time grows with the tokens of a step (both estimators are near-linear), so the projection
goes by seconds per cached token. It also says for how much of that time training waited for its data. Beside it:
FLOPs and bytes of a mean step, and what an H100 would need by the rates in ``pipeline/planning/devices.py``, an
estimate.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from perf.measure import write_result
from perf.trace_reading import TimedQueue
from pipeline.planning.counts import step_work
from pipeline.planning.devices import DEVICES
from pipeline.policy import train
from pipeline.policy.agents import AgentParams, PolicyShape
from pipeline.policy.estimators.base import ESTIMATORS
from pipeline.policy.train import TrainParams, describe, draw_cut, train_policy
from pipeline.section import read
from pipeline.traces.shards import SequenceInfo, TraceReader, TraceShape

STEPS, TOKENS = 4000, 4500
SHAPE = TraceShape("Qwen2.5-7B-Instruct", "random", layers=28, kv_heads=4, head_dim=128, block_size=64)
AGENT = AgentParams(hidden_width=256, hidden_layers=2, inputs=("key", "value", "position"))


class RandomTraces:
    """As much of a TraceReader as training uses, with ``count`` random sequences in memory."""

    def __init__(self, tokens: int, count: int) -> None:
        self.shape, self.root = SHAPE, Path("memory")
        self.sequences = [SequenceInfo(f"random-{index}", tokens, 0, index) for index in range(count)]
        generator = torch.Generator().manual_seed(0)
        heads, blocks = SHAPE.layers * SHAPE.kv_heads, -(-tokens // SHAPE.block_size)
        sizes = [(heads, tokens, SHAPE.head_dim)] * 2 + [(heads, tokens, blocks)]
        self._data = [
            tuple(torch.rand(size, generator=generator, dtype=torch.float16) for size in sizes) for _ in range(count)
        ]

    def read(self, sequence: int) -> tuple[Tensor, ...]:
        return self._data[sequence]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--traces", type=Path, help="traces on disk instead of random ones")
    parser.add_argument("--estimator", choices=["exact", "rloo"], default="exact")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a random sequence; the paper has 4,500")
    parser.add_argument("--steps", type=int, help="steps to time; 3 on a CPU, 200 elsewhere")
    arguments = parser.parse_args()
    device, on_cpu = arguments.device, torch.device(arguments.device).type == "cpu"
    warm_up, timed = (1, arguments.steps or 3) if on_cpu else (20, arguments.steps or 200)
    if arguments.traces:
        reader, validation = (TraceReader(arguments.traces, split, 8 << 30) for split in ("train", "validation"))
    else:
        reader, validation = RandomTraces(arguments.tokens, 2), RandomTraces(2 * SHAPE.block_size, 1)
    steps = warm_up + timed
    changes = {"agent": AGENT, "steps": steps + 1, "validate_every": steps + 1, "checkpoint_every": steps + 1}
    params = read("train", TrainParams).model_copy(update=changes)
    estimator = read(f"estimators.{arguments.estimator}", ESTIMATORS.load(arguments.estimator))
    marks: list[tuple[float, float]] = []
    train.Queue = TimedQueue  # type: ignore[misc,assignment]

    def advance(count: int, status: str) -> None:
        if not on_cpu:
            torch.cuda.synchronize(device)
        marks.append((time.perf_counter(), TimedQueue.waited))

    with tempfile.TemporaryDirectory() as work:
        config = describe(params, reader, estimator)
        train_policy(Path(work), reader, validation, estimator, params, config, device, advance)
    # The first mark is before the first step; the last step validates and is left out.
    seconds, waited = (after - before for after, before in zip(marks[steps], marks[warm_up], strict=True))
    tokens = sum(draw_cut(reader, params, step).cache_size for step in range(warm_up, steps))
    longest = max(sequence.tokens for sequence in reader.sequences)
    mean_tokens = reader.shape.block_size * ((longest - 1) // reader.shape.block_size + 1) / 2
    projected = STEPS * seconds / tokens * mean_tokens

    shape = PolicyShape(reader.shape.layers, reader.shape.kv_heads, reader.shape.head_dim, params.agent)
    work = step_work(shape, estimator, longest, reader.shape.block_size)
    transfer = 2 * shape.heads * shape.channels * mean_tokens
    h100 = STEPS * work.seconds(DEVICES["h100"], "float32")
    name = "CPU" if on_cpu else torch.cuda.get_device_name(device)
    print(
        f"{shape.heads} agents, {arguments.estimator}: {timed} steps of {tokens / timed:.0f} tokens on average, "
        f"{seconds / timed:.3f} s each, {waited / seconds:.0%} of it waiting for data\n"
        f"projected on this {name}: {STEPS} steps of {mean_tokens:.0f} tokens on average in {projected / 60:.1f} min\n"
        f"a mean step: {work.agent_flops / 1e9:.0f} GFLOP of products, {work.moved / 1e9:.1f} GB moved, "
        f"{transfer / 1e9:.2f} GB to the device\n"
        f"estimated for an H100 (rates not measured, traces in memory): {STEPS} steps in {h100 / 60:.1f} min"
    )
    content = {
        "estimator": arguments.estimator,
        "traces": str(arguments.traces or "random, in memory"),
        "seconds_per_step": seconds / timed,
        "tokens_per_step": tokens / timed,
        "share_waiting_for_data": waited / seconds,
        "projected_minutes": projected / 60,
        "flops_per_step": work.agent_flops,
        "bytes_per_step": work.moved,
        "bytes_to_the_device_per_step": transfer,
        "estimated_h100_minutes": h100 / 60,
    }
    write_result("paper_training" if arguments.estimator == "exact" else "paper_training_rloo", device, content)


if __name__ == "__main__":
    main()
