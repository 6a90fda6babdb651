"""One training step of all agents, stacked, against a loop over one module, optimizer and clip per head.

    python -m perf.training_step

SmolLM2-135M: 30 layers x 3 KV heads of width 64, 5 examples of 96 tokens, both estimators. Both sides read the same
float16 states, normalise them, score, differentiate, clip at 5 and step AdamW; the loop is what one writes with
nn.Sequential and torch.optim.AdamW as they come. Then the stacked step takes turns with one that learns from all tokens
of a single cache, twice as many, and tokens per second are compared. It also prints what no implementation can beat on
this machine: the FLOPs of the step at the rate of one large product of matrices, and with --profile where the stacked
step spends its time.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from perf.measure import interleaved, median_ratio, write_result
from pipeline.planning.counts import training_flops
from pipeline.policy.agents import Policy, PolicyShape
from pipeline.policy.batches import Batch, make_batch
from pipeline.policy.estimators.base import ESTIMATORS, Estimator
from pipeline.policy.train import TrainParams, compute_gradients
from pipeline.section import read
from pipeline.traces.draws import generator
from pipeline.traces.example import RankingExample

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64


class Loop:
    """One nn.Sequential, AdamW and clip per head, with the weights of a policy."""

    def __init__(self, policy: Policy, rate: float) -> None:
        self.policy, self.agents, self.optimizers = policy, [], []
        for head in range(policy.shape.heads):
            layers: list[nn.Module] = []
            for weight, bias in zip(policy.weights, policy.biases, strict=True):
                linear = nn.Linear(*weight.shape[1:], device=weight.device)
                linear.weight.data.copy_(weight[head].T)
                linear.bias.data.copy_(bias[head, 0])
                layers += [linear, nn.ReLU()]
            self.agents.append(nn.Sequential(*layers[:-1]))
            self.optimizers.append(torch.optim.AdamW(self.agents[-1].parameters(), lr=rate))

    def step(self, batch: Batch, estimator: Estimator) -> None:
        for head, (agent, optimizer) in enumerate(zip(self.agents, self.optimizers, strict=True)):
            heads = slice(head, head + 1)
            inputs = self.policy.inputs(batch.tokens[heads], heads)[0]  # (n, inputs)
            optimizer.zero_grad()
            target = batch.target[heads]
            scores = batch.placed(agent(inputs).T, heads)
            estimator.loss(scores, target, batch.uniform[:, heads]).mean().backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 5.0)
            optimizer.step()

    def distance(self) -> float:
        """Norm of the difference between the clipped gradients of both, over the norm of the policy's."""
        linears = [[agent[2 * layer] for agent in self.agents] for layer in range(len(self.policy.weights))]
        own = [torch.stack([linear.weight.grad.T for linear in layer]) for layer in linears]
        own += [torch.stack([linear.bias.grad[None] for linear in layer]) for layer in linears]
        stacked = [parameter.grad for parameter in (*self.policy.weights, *self.policy.biases)]
        difference = torch.cat([(first - second).flatten() for first, second in zip(own, stacked, strict=True)])
        return float(difference.norm() / torch.cat([gradient.flatten() for gradient in stacked]).norm())


def random_example(shape: PolicyShape, tokens: int, seed: int) -> RankingExample:
    """``tokens`` of each head, of a cache that is eight times as large."""
    draws = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, shape.heads, tokens, shape.head_dim, generator=draws).half()
    importance = 10 ** (-4 * torch.rand(shape.heads, tokens, generator=draws))
    positions = torch.arange(0, 8 * tokens, 8, dtype=torch.int32).expand(shape.heads, -1)
    count, best = torch.full_like(importance, 8.0), importance.sum(-1) * tokens
    return RankingExample(8 * tokens, keys, values, positions, importance, count, best)


def matrix_rate(device: str) -> float:
    """FLOP/s of one large float32 product, the best of five."""
    size = 2048 if torch.device(device).type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device)
    seconds = interleaved({"product": lambda: matrix @ matrix}, 5, device)["product"]
    return 2 * size**3 / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=96, help="known of each head of an example")
    parser.add_argument("--examples", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print the operators of one stacked step")
    arguments = parser.parse_args()
    device, tokens = arguments.device, arguments.tokens
    params = read("train", TrainParams)
    shape = PolicyShape(LAYERS, KV_HEADS, HEAD_DIM, params.agent)
    examples = [random_example(shape, tokens, seed) for seed in range(arguments.examples)]
    flops, rate = training_flops(shape) * shape.heads * tokens * len(examples), matrix_rate(device)
    limit = flops / rate
    whole = 2 * tokens * len(examples)  # tokens of one cache; 960 with the defaults
    print(
        f"{flops / 1e9:.1f} GFLOP of products per step; one large product reaches {rate / 1e9:.0f} GFLOP/s: "
        f"{limit:.3f} s"
    )
    rows = []
    for name in ("exact", "rloo"):
        estimator = read(f"estimators.{name}", ESTIMATORS.load(name))
        policy = Policy(shape, torch.Generator().manual_seed(1)).to(device)
        loop = Loop(policy, params.learning_rate)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=params.learning_rate, fused=True)
        batch = make_batch(examples, estimator.rankings, generator(0), device)

        cache = make_batch([random_example(shape, whole, 0)], estimator.rankings, generator(0), device)

        def stacked(batch=batch, policy=policy, optimizer=optimizer, estimator=estimator) -> None:
            compute_gradients(policy, batch, estimator, 5.0)
            optimizer.step()

        works: dict[str, Callable[[], object]] = {
            "stacked": stacked,
            "loop": lambda loop=loop, batch=batch, own=estimator: loop.step(batch, own),
        }
        for work in works.values():
            work()
        gradient_error = loop.distance()
        seconds = interleaved(works, arguments.repeats, device, warm_up=0)
        if arguments.profile:
            with torch.profiler.profile() as profiled:
                stacked()
            print(profiled.key_averages().table(f"self_{torch.device(device).type}_time_total", row_limit=12))
        ratio, lowest, highest = median_ratio(seconds["loop"], seconds["stacked"])
        turns = interleaved({"examples": stacked, "whole": partial(stacked, cache)}, 3 * arguments.repeats, device)
        tokens_ratio = median_ratio(turns["whole"], [2 * time for time in turns["examples"]])
        best = {name: min(times) for name, times in seconds.items()}
        print(
            f"{name:5s}  stacked {best['stacked']:.3f} s, loop {best['loop']:.3f} s, ratio {ratio:.2f} "
            f"({lowest:.2f} to {highest:.2f}); products alone would give {best['loop'] / limit:.2f}; gradients "
            f"differ by {gradient_error:.1e} of their norm"
        )
        print(
            f"       {tokens * len(examples) / min(turns['examples']):.0f} tokens per second, "
            f"{tokens_ratio[0]:.2f} ({tokens_ratio[1]:.2f} to {tokens_ratio[2]:.2f}) of {whole} tokens of one cache"
        )
        rows.append(
            {
                "estimator": name,
                "seconds": seconds,
                "ratio": ratio,
                "lowest_ratio": lowest,
                "highest_ratio": highest,
                "ratio_if_products_were_all": best["loop"] / limit,
                "gradient_difference": gradient_error,
                "turns": turns,
                "tokens_per_second_of_a_whole_cache": tokens_ratio,
            }
        )
    content = {
        "agents": shape.heads,
        "examples": len(examples),
        "tokens": tokens,
        "flops": flops,
        "matrix_flops_per_second": rate,
        "rows": rows,
    }
    write_result("training_step", device, content)


if __name__ == "__main__":
    main()
