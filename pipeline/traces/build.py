"""Turn samples into trace shards: prefill each sequence once, skip the shards that are already there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.models.layout import cache_layout
from pipeline.samples.sample import Sample
from pipeline.traces.capture import LayerTrace, capture_sequence
from pipeline.traces.importance import TracesParams
from pipeline.traces.shards import TraceShape, is_committed, write_manifest, write_shard


def build_traces(
    work: Path,
    model: PreTrainedModel,
    model_name: str,
    benchmark: str,
    splits: Mapping[str, Sequence[Sample]],
    params: TracesParams,
    advance: Callable[[int], None],
    layers: Sequence[int] | None = None,
) -> None:
    """Write the traces of all splits under ``work``, then the manifest.

    Parameters
    ----------
    splits
        split -> samples; prompt and true continuation are captured together, since the true tokens that
        follow a cache are what its importance is about.
    advance
        Called with the number of sequences done (or found done) since the last call.
    layers
        Numbers of the layers to keep; None for all that see the whole context.
    """
    layout = cache_layout(model)
    numbers = layout.ranked
    kept = [index for index, number in enumerate(numbers) if layers is None or number in layers]
    kept_numbers = tuple(numbers[index] for index in kept)
    shape = TraceShape(
        model_name, benchmark, len(kept), layout.kv_heads, layout.head_dim, params.block_size, kept_numbers
    )
    shards: dict[str, int] = {}
    for split, samples in splits.items():
        size = params.sequences_per_shard
        shards[split] = -(-len(samples) // size)
        for shard in range(shards[split]):
            members = samples[shard * size : (shard + 1) * size]
            if is_committed(work, split, shard):
                advance(len(members))
                continue
            captured = _capture(model, members, shard * size, params, advance)
            traces = ((index, name, [found[place] for place in kept]) for index, name, found in captured)
            write_shard(work, split, shard, shape, traces)
    write_manifest(work, shape, shards)


def _capture(
    model: PreTrainedModel, samples: Sequence[Sample], first: int, params: TracesParams, advance: Callable[[int], None]
) -> Iterator[tuple[int, str, list[LayerTrace]]]:
    for index, sample in enumerate(samples, start=first):
        traces = capture_sequence(model, torch.tensor(sample.input_ids), params.block_size, params.query_chunk)
        yield index, sample.sample_id, traces
        advance(1)
