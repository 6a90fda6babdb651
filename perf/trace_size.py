"""Bytes of trace files against the record of blocks that they replaced, and against keys and values in float16.

One sequence at a model's shapes, random states of one layer, is written as ``build_traces`` writes it; every layer's
files take equally many bytes. Compression takes about as much off these numbers as off true ones. The record kept keys
and values of all tokens and, for each, the attention from every later block of 64 queries: its bytes are a formula.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perf.measure import write_result
from pipeline.traces.build import choose_tokens
from pipeline.traces.draws import generator
from pipeline.traces.params import TracesParams, training_cuts
from pipeline.traces.shards import ExampleInfo, ShardWriter, TraceShape, write_manifest

BLOCK = 64  # queries of a block of the record


@dataclass(frozen=True)
class Heads:
    model: str
    layers: int
    kv_heads: int
    head_dim: int
    tokens: int


SMOLLM2 = Heads("SmolLM2-135M", 30, 3, 64, 1024)
MODELS = (SMOLLM2, Heads("Qwen2.5-7B", 28, 4, 128, 4500), Heads("Phi-4", 40, 10, 128, 4500))
# tokens of each head: those of the profiles default and paper-*, and all of them, as published.
KEPT = (96, 120, None)


def write_examples(
    root: Path, heads: Heads, layers: int, sequences: int, params: TracesParams, split: str = "train"
) -> int:
    """Write the examples of random sequences, a shard; returns the bytes of its files."""
    shape = TraceShape(heads.model, "random", tuple(range(layers)), heads.kv_heads, heads.head_dim)
    draws = torch.Generator().manual_seed(0)
    with ShardWriter(root, split, 0, shape) as writer:
        for sequence in range(sequences):
            cuts = training_cuts(heads.tokens, heads.tokens * 15 // 16, f"{split}{sequence}", params)
            for layer in range(layers):
                keys, values = torch.randn(2, heads.kv_heads, heads.tokens, heads.head_dim, generator=draws).half()
                importance = torch.rand(heads.kv_heads, heads.tokens, generator=draws) ** 8
                for place, cut in enumerate(cuts):
                    info = ExampleInfo(sequence * len(cuts) + place, sequence, f"{split}{sequence}", cut)
                    if layer == 0:
                        writer.examples.append(info)
                    purpose = generator(params.seed, info.sample_id, info.example, layer)
                    known = params.tokens if split == "train" else None
                    rows = choose_tokens(keys, values, importance[:, :cut], known, purpose, info.sample_id, layer)
                    writer.write_layer(layer, info, rows)
    return sum(path.stat().st_size for path in (root / split).rglob("*.parquet"))


def finish(root: Path, heads: Heads, layers: int, splits: dict[str, int]) -> None:
    """Make what was written readable."""
    shape = TraceShape(heads.model, "random", tuple(range(layers)), heads.kv_heads, heads.head_dim)
    write_manifest(root, shape, splits)


def measure(heads: Heads, kept: int | None, sequences: int, cuts: int) -> dict[str, Any]:
    """Bytes of a sequence with all layers; of its keys and values; and of its record of blocks."""
    params = TracesParams(cuts=cuts, at_prompt_end=0.0, tokens=kept, sequences_per_shard=sequences, seed=0)
    with tempfile.TemporaryDirectory() as directory:
        size = write_examples(Path(directory), heads, 1, sequences, params) / sequences
    n, numbers = heads.tokens, heads.layers * heads.kv_heads * heads.tokens
    record = numbers * (2 * 2 * heads.head_dim + 2 * (n / BLOCK - 1) / 2)
    return {
        "model": heads.model,
        "tokens": n,
        "cuts": cuts,
        "kept": kept,
        "bytes_per_sequence": size * heads.layers,
        "keys_values_bytes": numbers * 4 * heads.head_dim,
        "record_bytes": record,
        "ratio_to_record": size * heads.layers / record,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="accepted as everywhere in perf/; files are written by the CPU")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--cuts", type=int, default=2)
    arguments = parser.parse_args()
    rows = [measure(heads, kept, arguments.sequences, arguments.cuts) for heads in MODELS for kept in KEPT]
    for row in rows:
        kept = "all" if row["kept"] is None else row["kept"]
        print(
            f"{row['model']}, {row['tokens']} tokens, {row['cuts']} cuts, {kept} tokens of each head: "
            f"{row['bytes_per_sequence'] / 1e6:.1f} MB per sequence, {row['ratio_to_record']:.3f} of the record of "
            f"blocks ({row['record_bytes'] / 1e6:.0f} MB); keys and values {row['keys_values_bytes'] / 1e6:.0f} MB"
        )
    print(write_result("trace_size", arguments.device, {"models": rows}))


if __name__ == "__main__":
    main()
