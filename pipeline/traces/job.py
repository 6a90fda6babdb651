"""The traces of a benchmark as units of work: a unit is a shard of sequences. It knows no stage."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from pipeline.closure import Code
from pipeline.executor.place import model_memory
from pipeline.executor.units import Advance
from pipeline.models.load import load_model
from pipeline.samples.sample import Sample, read_samples
from pipeline.traces.build import build_shard
from pipeline.traces.params import TracesParams
from pipeline.traces.shards import TraceShape, marker, write_manifest


@dataclass(frozen=True)
class TracesJob:
    """See :class:`pipeline.executor.units.Job`; a unit leaves its files, the marker last.

    Attributes
    ----------
    weights
        Where the model lies.
    samples, counts
        split -> where its samples lie, and how many they are.
    """

    together: ClassVar[int] = 1

    name: str
    directory: Path
    code: Code
    device: str
    shape: TraceShape
    dtype: str
    weights: Path
    samples: Mapping[str, Path]
    counts: Mapping[str, int]
    params: TracesParams

    @property
    def memory(self) -> int:
        """As much as its model takes."""
        return model_memory(self.weights)

    def units(self) -> Mapping[str, int]:
        """A shard each, by its sequences."""
        size = self.params.sequences_per_shard
        return {
            f"{split}-{shard:05d}": min(size, count - shard * size)
            for split, count in self.counts.items()
            for shard in range(-(-count // size))
        }

    def is_done(self, unit: str) -> bool:
        """Whether the shard's marker is there."""
        split, shard = unit.rsplit("-", 1)
        return marker(self.directory, split, int(shard)).is_file()

    @contextmanager
    def open(self) -> Iterator[tuple[PreTrainedModel, Mapping[str, Sequence[Sample]]]]:
        """The model, and the samples of each split."""
        samples = {split: read_samples(path) for split, path in self.samples.items()}
        yield load_model(self.weights, self.dtype, self.device), samples

    def run(self, state: tuple[PreTrainedModel, Mapping[str, Sequence[Sample]]], unit: str, advance: Advance) -> None:
        """Capture the sequences of one shard."""
        model, samples = state
        split, shard = unit.rsplit("-", 1)
        build_shard(self.directory, model, self.shape, split, int(shard), samples[split], self.params, advance)

    def gather(self) -> Path:
        """The manifest of all shards; returns the directory of the traces."""
        size = self.params.sequences_per_shard
        shards = {split: -(-count // size) for split, count in self.counts.items()}
        write_manifest(self.directory, self.shape, shards)
        return self.directory
