"""Bytes of trace files against keys, values and queries in float16.

Random tensors of a model's shapes go through ``write_shard``; the bytes are those of the Parquet files. They do not
depend on the numbers, and every layer's file takes equally many, so a few layers and sequences say it all.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from perf.measure import write_result
from pipeline.traces.capture import LayerTrace
from pipeline.traces.shards import TraceShape, write_shard

BLOCK_SIZE = 64  # of the default profile


@dataclass(frozen=True)
class Heads:
    model: str
    query_heads: int
    kv_heads: int
    head_dim: int
    tokens: int


MODELS = (Heads("SmolLM2-135M", 9, 3, 64, 1024), Heads("Qwen2.5-7B", 28, 4, 128, 4500))


def random_layer(heads: Heads, generator: torch.Generator) -> LayerTrace:
    size = (heads.kv_heads, heads.tokens)
    keys, values = (torch.randn(*size, heads.head_dim, generator=generator) for _ in range(2))
    return LayerTrace(keys, values, torch.rand(*size, -(-heads.tokens // BLOCK_SIZE), generator=generator))


def measure(heads: Heads, sequences: int) -> dict[str, Any]:
    """Bytes per token and KV head: of the file, of each column in it, and of K, V and Q."""
    shape = TraceShape(heads.model, "random", 1, heads.kv_heads, heads.head_dim, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    rows = sequences * heads.kv_heads * heads.tokens
    with tempfile.TemporaryDirectory() as directory:
        traces = ((index, "random", [random_layer(heads, generator)]) for index in range(sequences))
        write_shard(Path(directory), "train", 0, shape, traces)
        (path,) = Path(directory).rglob("*.parquet")
        size = path.stat().st_size / rows
        metadata = pq.read_metadata(path)
    columns: dict[str, float] = {}
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            name = chunk.path_in_schema.partition(".")[0]
            columns[name] = columns.get(name, 0.0) + chunk.total_compressed_size / rows
    states = 2 * heads.head_dim * (2 + heads.query_heads // heads.kv_heads)
    blocks = -(-heads.tokens // BLOCK_SIZE)
    numbers = 2 * (2 * heads.head_dim + BLOCK_SIZE * blocks * (blocks - 1) / 2 / heads.tokens)
    return {
        "model": heads.model,
        "tokens": heads.tokens,
        "file": size,
        "columns": columns,
        "footer": size - sum(columns.values()),
        "numbers_alone": numbers,
        "keys_values_queries": states,
        "ratio": size / states,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="accepted as everywhere in perf/; files are written by the CPU")
    parser.add_argument("--sequences", type=int, default=4)
    arguments = parser.parse_args()
    rows = [measure(heads, arguments.sequences) for heads in MODELS]
    for row in rows:
        print(
            f"{row['model']}, {row['tokens']} tokens: {row['file']:.1f} bytes per token and KV head, "
            f"K + V + Q {row['keys_values_queries']}, ratio {row['ratio']:.4f}"
        )
        print("  " + ", ".join(f"{name} {size:.2f}" for name, size in row["columns"].items()))
        print(f"  rest {row['footer']:.2f}; the numbers alone {row['numbers_alone']:.1f}")
    print(write_result("trace_size", arguments.device, {"models": rows}))


if __name__ == "__main__":
    main()
