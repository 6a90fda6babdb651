"""Turn samples into trace shards: run the model once over each sequence, skip the shards that are already there.

While the model reads a sequence, threads choose the tokens of the one before it, fetch, convert and write them.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.models.layers import ModelLayer
from pipeline.models.layout import cache_layout
from pipeline.samples.sample import Sample
from pipeline.traces.capture import run_captured
from pipeline.traces.draws import generator
from pipeline.traces.example import SMALLEST_IMPORTANCE, best_cost, inclusion_probabilities
from pipeline.traces.params import SMALLEST_CUT, TracesParams, training_cuts, validation_cut
from pipeline.traces.shards import (
    ExampleInfo,
    LayerRows,
    ShardWriter,
    TraceShape,
    as_float16,
    marker,
    write_manifest,
)

# Threads that write, and sequences that may wait for them: each is a whole cache in memory.
_THREADS, _WAITING = 4, 1
_local = threading.local()


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
        follow a cache are what its importance is about. Samples of the split ``train`` are cut and their tokens
        chosen as ``params`` say; those of others are cut once, in their middle, and all tokens are kept.
    advance
        Called with the number of sequences done (or found done) since the last call.
    layers
        Numbers of the layers to keep; None for all that see the whole context.

    Raises
    ------
    PipelineError
        A key or value is not finite or does not fit float16, or the disk is full.
    """
    layout = cache_layout(model)
    kept = tuple(number for number in layout.ranked if layers is None or number in layers)
    shape = TraceShape(model_name, benchmark, kept, layout.kv_heads, layout.head_dim)
    size = params.sequences_per_shard
    shards = {split: -(-len(samples) // size) for split, samples in splits.items()}
    for split, samples in splits.items():
        for shard in range(shards[split]):
            if marker(work, split, shard).is_file():
                advance(len(samples[shard * size : (shard + 1) * size]))
            else:
                build_shard(work, model, shape, split, shard, samples, params, advance)
    write_manifest(work, shape, shards)


def build_shard(
    work: Path,
    model: PreTrainedModel,
    shape: TraceShape,
    split: str,
    shard: int,
    samples: Sequence[Sample],
    params: TracesParams,
    advance: Callable[[int], None],
) -> None:
    """Write one shard of a split, whose ``samples`` are all of it; otherwise as :func:`build_traces`."""
    with ShardWriter(work, split, shard, shape) as writer:
        capture = _Capture(model, params, split, writer, cache_layout(model).ranked)
        capture.run(samples, shard * params.sequences_per_shard, advance)


@dataclass(frozen=True)
class _Capture:
    """Fills one shard. ``ranked`` are the numbers of all layers that see the whole context."""

    model: PreTrainedModel
    params: TracesParams
    split: str
    writer: ShardWriter
    ranked: tuple[ModelLayer, ...]

    def run(self, samples: Sequence[Sample], first: int, advance: Callable[[int], None]) -> None:
        """Capture the samples of the split from ``first`` on, as many as a shard holds."""
        waiting: deque[list[Future[None]]] = deque()
        layers = self.writer.shape.layer_numbers
        # A layer is always written by the same thread: its examples keep their order.
        threads = [ThreadPoolExecutor(1) for _ in range(min(_THREADS, len(layers)))]
        try:
            for sequence in range(first, min(first + self.params.sequences_per_shard, len(samples))):
                captured = self._read(samples[sequence], sequence)
                self.writer.examples += captured.examples
                waiting.append(
                    [
                        threads[place % len(threads)].submit(self._write, layer, captured)
                        for place, layer in enumerate(layers)
                    ]
                )
                if len(waiting) > _WAITING:
                    _finish(waiting, advance)
            while waiting:
                _finish(waiting, advance)
        finally:
            # All of them before any is waited for: after an error nothing more is to be written.
            for thread in threads:
                thread.shutdown(wait=False, cancel_futures=True)
            for thread in threads:
                thread.shutdown()

    def _read(self, sample: Sample, sequence: int) -> "_Captured":
        tokens = len(sample.input_ids)
        if tokens <= SMALLEST_CUT:
            raise PipelineError(
                f"Sample {sample.sample_id} has {tokens} tokens; {SMALLEST_CUT + 1} are the least that can be learned "
                "from: drop it."
            )
        cuts: tuple[int, ...] = (validation_cut(tokens),)
        if self.split == "train":
            cuts = training_cuts(tokens, sample.context_len, sample.sample_id, self.params)
        cache = DynamicCache()
        importance = run_captured(self.model, torch.tensor(sample.input_ids), cache, cuts)
        examples = [
            ExampleInfo(sequence * len(cuts) + place, sequence, sample.sample_id, cut) for place, cut in enumerate(cuts)
        ]
        computed = None
        if self.model.device.type == "cuda":
            computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            computed.record(torch.cuda.current_stream(self.model.device))
        return _Captured(examples, cache, importance, computed)

    @torch.inference_mode()
    def _write(self, layer: int, captured: "_Captured") -> None:
        """Choose the tokens of one layer, fetch and write them."""
        states = captured.cache.layers[layer]
        assert states.keys is not None
        assert states.values is not None
        place, tokens = self.ranked.index(ModelLayer(layer)), self.params.tokens if self.split == "train" else None
        with _stream(self.model.device, captured.computed):
            for info in captured.examples:
                importance = captured.importance[info.cache_size][place]
                draws = generator(self.params.seed, "tokens", info.sample_id, info.example, layer)
                rows = choose_tokens(states.keys[0], states.values[0], importance, tokens, draws, info.sample_id, layer)
                self.writer.write_layer(layer, info, rows)


def choose_tokens(
    keys: Tensor,
    values: Tensor,
    importance: Tensor,
    tokens: int | None,
    draws: torch.Generator,
    sample_id: str,
    layer: int,
) -> LayerRows:
    """The rows of one layer of an example: of each KV head a sample of its tokens, on the CPU.

    Parameters
    ----------
    keys, values
        (kv_heads, n, head_dim), n at least the cache size.
    importance
        (kv_heads, cache_size).
    tokens
        How many are expected of each head; None for all.
    draws
        What decides about each token.
    sample_id, layer
        For messages.

    Raises
    ------
    PipelineError
        A key or value is not finite or does not fit float16.
    """
    importance = importance.float().clamp_min(SMALLEST_IMPORTANCE).cpu()
    probability = inclusion_probabilities(importance, tokens)
    known = torch.rand(probability.shape, generator=draws, dtype=torch.float64) < probability
    kv_head, position = known.nonzero(as_tuple=True)
    return LayerRows(
        kv_head,
        position,
        importance[known],
        probability[known].float(),
        as_float16(keys[kv_head, position], sample_id, layer, "key").cpu(),
        as_float16(values[kv_head, position], sample_id, layer, "value").cpu(),
        importance,
        best_cost(importance.double()).float(),
    )


@dataclass(frozen=True)
class _Captured:
    """One sequence as the model has read it; on a GPU, ``computed`` tells when its last layer is there."""

    examples: list[ExampleInfo]
    cache: DynamicCache
    importance: dict[int, Tensor]
    computed: torch.cuda.Event | None


@contextmanager
def _stream(device: torch.device, computed: torch.cuda.Event | None) -> Iterator[None]:
    """On a GPU, a stream of this thread's own for what is copied while the model reads the next sequence."""
    if computed is None:
        yield
        return
    if not hasattr(_local, "stream"):
        _local.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    _local.stream.wait_event(computed)
    with torch.cuda.stream(_local.stream):
        yield


def _finish(waiting: "deque[list[Future[None]]]", advance: Callable[[int], None]) -> None:
    """Wait for the first sequence that is being written."""
    for future in waiting.popleft():
        future.result()
    advance(1)
