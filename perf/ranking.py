"""Ranking a whole prefilled cache beside the prefill: SmolLM2, and one layer of Qwen2.5-7B's shapes.

The policy is untrained, which ranks as fast. One layer of random weights stands for Qwen2.5-7B: both the prefill
and the ranking are the same work in each of its 28 layers, embedding and output aside.
"""

from pathlib import Path
from typing import Annotated

import polars as pl
import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from perf.measure import benchmark_model, write_result
from pipeline.models.load import head_shape
from pipeline.policy.agents import AgentParams, Policy, PolicyShape
from studies.latency.measure import measure_latency

AGENT = AgentParams(hidden_width=256, hidden_layers=2, inputs=("key", "value", "position"))


def qwen_layer(dtype: torch.dtype, device: str) -> PreTrainedModel:
    """One layer with the sizes of Qwen2.5-7B and a small vocabulary."""
    config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=1,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def flops_per_token(model: PreTrainedModel, policy: Policy, length: int) -> tuple[float, float]:
    """FLOPs of matrix products per token: of all agents, and of the prefill (half of the attention is masked)."""
    config = model.config
    agents = policy.shape.heads * sum(
        2 * a * b for a, b in zip(policy.shape.widths, policy.shape.widths[1:], strict=False)
    )
    layers = sum(parameter.numel() for parameter in model.base_model.layers.parameters())
    head_dim = policy.shape.head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * 4 * head_dim * length / 2
    return agents, 2 * layers + attention


def main(
    model_directory: Annotated[Path, typer.Option(help="What the model stage wrote.")] = Path("models/smollm2-135m"),
    random: Annotated[str, typer.Option(help="A model of random weights instead (perf/measure.py).")] = "",
    only_model: Annotated[bool, typer.Option(help="Leave out the layer of Qwen2.5-7B's shapes.")] = False,
    device: str = "cpu",
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "1024,4096",
    repeats: int = 3,
) -> None:
    """Time ranking and prefill of both models."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    name = f"{random}, random weights" if random else "SmolLM2-135M"
    models = {name: benchmark_model(random, model_directory, device, str(dtype).removeprefix("torch."))}
    if not only_model:
        models["one layer of Qwen2.5-7B's shapes"] = qwen_layer(dtype, device)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in models.items():
        policy = Policy(PolicyShape(*head_shape(model), AGENT), torch.Generator().manual_seed(0)).eval().to(device)
        table = measure_latency(model, policy, [int(length) for length in lengths.split(",")], repeats)
        seconds = table.group_by("length", "work").agg(pl.col("seconds").median())
        found[name] = {}
        for length in table["length"].unique().sort().to_list():
            of_length = dict(seconds.filter(pl.col("length") == length).select("work", "seconds").rows())
            ranking, prefill = of_length["ranking, all layers"], of_length["prefill"]
            agents, whole = flops_per_token(model, policy, length)
            print(
                f"{name}, {length} tokens: ranking {ranking * 1e3:.1f} ms, prefill {prefill * 1e3:.0f} ms, "
                f"{ranking / prefill:.2%} of its time, {agents / whole:.2%} of its FLOPs; decode step "
                f"{of_length['decode step'] * 1e3:.1f} ms",
                flush=True,
            )
            found[name][str(length)] = {
                "ranking_seconds": ranking,
                "prefill_seconds": prefill,
                "decode_step_seconds": of_length["decode step"],
                "ratio": ranking / prefill,
                "flops_ratio": agents / whole,
            }
    print(write_result("ranking", device, found))


if __name__ == "__main__":
    typer.run(main)
