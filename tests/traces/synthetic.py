"""Traces of random caches, for whatever learns from traces."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.traces.build import choose_tokens
from pipeline.traces.draws import generator
from pipeline.traces.shards import ExampleInfo, ShardWriter, TraceShape, write_manifest

# Keys and values (layers, kv_heads, n, head_dim) and importance (layers, kv_heads, n) of one cache.
Cache = tuple[Tensor, Tensor, Tensor]


def random_cache(shape: TraceShape, tokens: int, seed: int) -> Cache:
    draws = torch.Generator().manual_seed(seed)
    size = (shape.layers, shape.kv_heads, tokens)
    keys, values = torch.randn(2, *size, shape.head_dim, generator=draws)
    return keys, values, torch.rand(size, generator=draws) ** 3


def write_traces(
    root: Path,
    shape: TraceShape,
    splits: Mapping[str, Sequence[Sequence[Cache]]],
    tokens: int | None = None,
    per_shard: int = 100,
) -> None:
    """Write sequences of each split, each a list of its caches; ``tokens`` of each head are expected to be kept."""
    shards = {}
    for split, sequences in splits.items():
        shards[split] = -(-len(sequences) // per_shard)
        example = 0
        for shard in range(shards[split]):
            with ShardWriter(root, split, shard, shape) as writer:
                for sequence in range(shard * per_shard, min((shard + 1) * per_shard, len(sequences))):
                    for keys, values, importance in sequences[sequence]:
                        info = ExampleInfo(example, sequence, f"{split}{sequence}", importance.shape[-1])
                        writer.examples.append(info)
                        for place, layer in enumerate(shape.layer_numbers):
                            draws = generator(0, split, example, layer)
                            layers = (states[place] for states in (keys, values, importance))
                            rows = choose_tokens(*layers, tokens, draws, info.sample_id, layer)
                            writer.write_layer(layer, info, rows)
                        example += 1
    write_manifest(root, shape, shards)
