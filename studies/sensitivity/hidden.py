"""Hidden states beside traces: what a layer computes the keys and values of a token from.

The hidden state of a layer is the input of its attention, behind the norm in front of it: what the key and
value projections see, and what kvpress hands to a press. The KV heads of a layer share it, so it is stored
once for each layer and token, as float16, in a directory of its own:

    <root>/manifest.json                       width, and the checksum of each file
    <root>/<split>/hidden=07/shard-00000.parquet

One row is one token, one row group one sequence; shards hold the sequences of the traces' shards. No policy of
the pipeline sees hidden states, only the sensitivity study asks for them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.files import atomic_write, hash_file, write_json
from pipeline.models.forward import run_model
from pipeline.models.layers import ModelLayer
from pipeline.models.layout import cache_layout
from pipeline.samples.sample import Sample
from pipeline.traces.example import RankingExample
from pipeline.traces.shards import MANIFEST, ExampleReader, as_float16, remove_unfinished


@contextmanager
def record_hidden_states(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While it is open, each run of ``model`` on one sequence of n tokens fills what is yielded.

    Yields
    ------
    layer -> (n, hidden_size), model dtype: the hidden states that enter the attention of that layer (its number
    in the model).
    """
    states: dict[int, Tensor] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (entering,) = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # (1, n, hidden_size)
        states[module.layer_idx] = entering

    modules = cache_layout(model).modules
    handles = [modules[ModelLayer(layer)].register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def build_hidden_states(
    work: Path,
    model: PreTrainedModel,
    splits: Mapping[str, Sequence[Sample]],
    layers: Sequence[int],
    sequences_per_shard: int,
    advance: Callable[[int], None],
) -> None:
    """Write the hidden states of all splits under ``work``, then the manifest; finished shards are kept.

    Parameters
    ----------
    splits
        split -> samples, the same as those of the traces; prompt and true continuation run together.
    layers
        Numbers of the model's layers.
    advance
        Called with the number of sequences done (or found done) since the last call.

    Raises
    ------
    PipelineError
        The model lacks one of the layers, or it slides over a window; a state does not fit float16; the disk is
        full.
    """
    if absent := sorted(set(layers) - set(cache_layout(model).ranked)):
        raise PipelineError(f"sensitivity.layers names {absent[0]}, which is no layer that sees the whole context.")
    width = model.config.get_text_config(decoder=True).hidden_size
    with record_hidden_states(model, layers) as states:

        def run(samples: Sequence[Sample], first: int) -> Iterator[tuple[int, str, dict[int, Tensor]]]:
            for index, sample in enumerate(samples, start=first):
                run_model(model, torch.tensor(sample.input_ids)[None], None, 0, 1)
                yield index, sample.sample_id, states
                advance(1)

        for split, samples in splits.items():
            for shard, first in enumerate(range(0, len(samples), sequences_per_shard)):
                members = samples[first : first + sequences_per_shard]
                if all(_path(work, split, layer, shard).is_file() for layer in layers):
                    advance(len(members))
                else:
                    write_hidden_shard(work, split, shard, layers, width, run(members, first))
    write_hidden_manifest(work, width)


def write_hidden_shard(
    root: Path,
    split: str,
    shard: int,
    layers: Sequence[int],
    width: int,
    sequences: Iterable[tuple[int, str, Mapping[int, Tensor]]],
) -> None:
    """Write the file of each layer, which appear when all are complete.

    Parameters
    ----------
    sequences
        (index within the split, sample id, layer -> (n, width) states); consumed one at a time.

    Raises
    ------
    PipelineError
        A state does not fit float16, or the disk is full.
    """
    schema = pa.schema([("sequence", pa.int32()), ("position", pa.int32()), ("hidden", pa.list_(pa.float16(), width))])
    with ExitStack() as files:
        temporary = {layer: files.enter_context(atomic_write(_path(root, split, layer, shard))) for layer in layers}
        with ExitStack() as open_writers:
            writers = {
                layer: open_writers.enter_context(
                    pq.ParquetWriter(
                        path,
                        schema,
                        compression="none",
                        use_dictionary=False,
                        write_statistics=["sequence"],
                        version="2.6",
                    )
                )
                for layer, path in temporary.items()
            }
            for index, sample_id, states in sequences:
                for layer, writer in writers.items():
                    vectors = as_float16(states[layer], sample_id, layer, "hidden state").cpu().numpy()  # (n, width)
                    columns = [
                        pa.array(np.full(len(vectors), index, np.int32)),
                        pa.array(np.arange(len(vectors), dtype=np.int32)),
                        pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width),
                    ]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(vectors))


def write_hidden_manifest(root: Path, width: int) -> None:
    """Write manifest.json over the files that lie under ``root``; what a killed process left half-written goes."""
    remove_unfinished(root)
    files = {str(path.relative_to(root)): hash_file(path) for path in sorted(root.glob("*/hidden=*/shard-*.parquet"))}
    write_json(root / MANIFEST, {"hidden_size": width, "files": files})


class HiddenReader(ExampleReader):
    """Examples with hidden states in place of the keys, and values of width 0; otherwise as :class:`ExampleReader`.

    Parameters
    ----------
    hidden
        What :func:`build_hidden_states` wrote, for the layers that are read and the sequences of the traces
        ``root``. ``shape.head_dim`` is then the width of a hidden state.

    Raises
    ------
    PipelineError
        As for :class:`ExampleReader`, of either directory.
    """

    def __init__(
        self,
        root: Path,
        hidden: Path,
        split: str,
        cache_bytes: int,
        layers: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
    ) -> None:
        super().__init__(root, split, cache_bytes, layers, sequences)
        self._traces = ExampleReader(root, split, 0, layers, sequences)
        self._hidden = hidden
        self._right: set[Path] = set()
        try:
            manifest = json.loads((hidden / MANIFEST).read_text())
            self.shape = replace(self.shape, head_dim=manifest["hidden_size"])
            self._sums: dict[str, str] = manifest["files"]
        except (OSError, ValueError, KeyError) as error:
            raise PipelineError(
                f"{hidden / MANIFEST} cannot be read ({error}); run the stage sensitivity_traces again."
            ) from None

    def _read(self, index: int) -> RankingExample:
        example = self._traces.read(index)
        positions = torch.split(example.positions, self.shape.kv_heads)  # of each layer, (kv_heads, m)
        # All KV heads of a layer look at the same hidden states.
        states = [
            self._states(layer, index)[places.long()]
            for layer, places in zip(self.shape.layer_numbers, positions, strict=True)
        ]
        return replace(example, keys=torch.cat(states), values=example.values[..., :0])

    def _states(self, layer: int, index: int) -> Tensor:
        """The hidden states of a layer in the sequence of an example, (n, hidden_size) float16."""
        path = _path(self._hidden, self.split, layer, self._places[index][0])
        if path not in self._right:
            expected = self._sums.get(str(path.relative_to(self._hidden)))
            if not path.is_file() or hash_file(path) != expected:
                raise PipelineError(f"{path} is missing or was changed; run the stage sensitivity_traces again.")
            self._right.add(path)
        wanted = [("sequence", "=", self.examples[index].sequence)]
        column = pq.read_table(path, columns=["hidden"], filters=wanted, use_threads=False, partitioning=None)[0]
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        return torch.from_numpy(flat).view(-1, self.shape.head_dim)


def _path(root: Path, split: str, layer: int, shard: int) -> Path:
    return root / split / f"hidden={layer:02d}" / f"shard-{shard:05d}.parquet"
