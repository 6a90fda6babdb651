"""The paper's training: 112 agents (28 layers x 4 KV heads, head_dim 128), sequences of 4,500 tokens, 4,000 steps.

    python -m perf.paper_training

Runs ``train_policy`` on random examples in memory for a few steps after a warm-up and projects 4,000 of them: with all
tokens of one cache in a step, as published (``--kept 0``), and with the sample of the paper's profiles, 8 caches of 120
tokens of each head. It also says for how much of that time training waited for its data. Beside it: FLOPs and bytes of
a mean step, and what the plan says of an H100.
"""

import argparse
from pathlib import Path

import torch

from perf.measure import wait, write_result
from perf.trace_reading import timed_training
from perf.training_step import random_example
from pipeline.planning.counts import step_work
from pipeline.planning.devices import DEVICES
from pipeline.policy.agents import AgentParams, PolicyShape
from pipeline.policy.estimators.base import ESTIMATORS
from pipeline.policy.train import TrainParams
from pipeline.section import read
from pipeline.traces.example import RankingExample
from pipeline.traces.shards import ExampleInfo, TraceShape

STEPS, TOKENS = 4000, 4500
SHAPE = TraceShape("Qwen2.5-7B-Instruct", "random", tuple(range(28)), kv_heads=4, head_dim=128)
AGENT = AgentParams(hidden_width=256, hidden_layers=2, inputs=("key", "value", "position"))
POLICY = PolicyShape(SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim, AGENT)


class RandomExamples:
    """As much of an ExampleReader as training uses, with ``count`` random examples in memory."""

    def __init__(self, tokens: int, count: int) -> None:
        self.shape, self.root, self.sequences = SHAPE, Path("memory"), count
        self._data = [random_example(POLICY, tokens, seed) for seed in range(count)]
        self.examples = [
            ExampleInfo(place, place, "random", example.cache_size) for place, example in enumerate(self._data)
        ]

    def read(self, index: int) -> RankingExample:
        return self._data[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--estimator", choices=["exact", "rloo"], default="exact")
    parser.add_argument(
        "--kept", type=int, default=120, help="tokens of each head; 0 for half of 4,500, in one example"
    )
    parser.add_argument("--steps", type=int, help="steps to time; 3 on a CPU, 200 elsewhere")
    arguments = parser.parse_args()
    device, on_cpu = arguments.device, torch.device(arguments.device).type == "cpu"
    warm_up, timed = (1, arguments.steps or 3) if on_cpu else (20, arguments.steps or 200)
    examples, tokens = (8, arguments.kept) if arguments.kept else (1, TOKENS // 2)
    readers = RandomExamples(tokens, 4), RandomExamples(128, 1)
    steps = warm_up + timed
    changes = {"agent": AGENT, "steps": steps + 1, "validate_every": steps + 1, "checkpoint_every": steps + 1}
    params = read("train", TrainParams).model_copy(update=changes | {"batch_size": examples})
    estimator = read(f"estimators.{arguments.estimator}", ESTIMATORS.load(arguments.estimator))
    # Whoever waits for the device only at the end of what is timed sees whether the host keeps up.
    marked = [0]

    def synchronize() -> None:
        if marked[0] in (warm_up, steps):
            wait(device)
        marked[0] += 1

    marks = timed_training(readers, estimator, params, device, synchronize)
    # The first mark is before the first step; the last step validates and is left out.
    seconds, waited = (after - before for after, before in zip(marks[steps], marks[warm_up], strict=True))
    projected = STEPS * seconds / timed
    work = step_work(POLICY, estimator, examples, tokens, not on_cpu)
    transfer = 2 * POLICY.heads * POLICY.channels * examples * tokens
    h100 = STEPS * step_work(POLICY, estimator, examples, tokens, True).seconds(DEVICES["h100"], "float32")
    name = "CPU" if on_cpu else torch.cuda.get_device_name(device)
    print(
        f"{POLICY.heads} agents, {arguments.estimator}: {timed} steps of {examples} examples with {tokens} tokens, "
        f"{seconds / timed:.4f} s each, {waited / seconds:.0%} of it waiting for data\n"
        f"projected on this {name}: {STEPS} steps in {projected / 60:.1f} min\n"
        f"a step: {work.agent_flops / 1e9:.0f} GFLOP of products, {work.moved / 1e9:.1f} GB moved, "
        f"{transfer / 1e9:.2f} GB to the device\n"
        f"by the plan's rates of an H100, data at hand: {STEPS} steps in {h100 / 60:.1f} min"
    )
    content = {
        "estimator": arguments.estimator,
        "examples": examples,
        "tokens": tokens,
        "seconds_per_step": seconds / timed,
        "share_waiting_for_data": waited / seconds,
        "projected_minutes": projected / 60,
        "flops_per_step": work.agent_flops,
        "bytes_per_step": work.moved,
        "bytes_to_the_device_per_step": transfer,
        "planned_h100_minutes": h100 / 60,
    }
    suffix = ("" if arguments.estimator == "exact" else "_rloo") + ("" if arguments.kept else "_all_tokens")
    write_result(f"paper_training{suffix}", device, content)


if __name__ == "__main__":
    main()
