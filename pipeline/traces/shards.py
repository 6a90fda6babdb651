"""Ranking examples on disk: Parquet shards, partitioned by layer, resumable and checksummed. It runs no model.

    <root>/manifest.json                          everything a reader needs, and the checksum of each file
    <root>/<split>/shard-00000.json               commit marker of a shard, written after its files
    <root>/<split>/layer=07/tokens-00000.parquet  a row for each known token of a KV head; a row group is an example
    <root>/<split>/layer=07/heads-00000.parquet   a row for each example and KV head: its best cost, all importances

Plain Parquet: ``pl.scan_parquet("traces/.../layer=*/tokens-*.parquet")`` is the whole of it. Bytes are reproducible: no
timestamps, fixed encodings, pinned pyarrow.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.files import disk_errors, hash_file, remove, temporary_name, write_json
from pipeline.traces.example import RankingExample

MANIFEST = "manifest.json"
FILES = ("tokens", "heads")
_LABELS = ("example", "sequence", "cache_size", "kv_head")


@dataclass(frozen=True)
class TraceShape:
    """What all shards of one directory share.

    ``layer_numbers`` are the model's numbers of the captured layers.
    """

    model: str
    benchmark: str
    layer_numbers: tuple[int, ...]
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_numbers", tuple(self.layer_numbers))  # a manifest holds a list

    @property
    def layers(self) -> int:
        """How many were captured."""
        return len(self.layer_numbers)

    def schemas(self) -> dict[str, pa.Schema]:
        """Arrow schema of each of ``FILES``."""
        vector = pa.list_(pa.float16(), self.head_dim)
        head = list(zip(_LABELS, (pa.int32(), pa.int32(), pa.int32(), pa.int16()), strict=True))
        token = [("position", pa.int32()), ("importance", pa.float32()), ("probability", pa.float32())]
        return {
            "tokens": pa.schema([*head, *token, ("key", vector), ("value", vector)]),
            "heads": pa.schema([*head, ("best_cost", pa.float32()), ("importance", pa.list_(pa.float32()))]),
        }


@dataclass(frozen=True)
class ExampleInfo:
    """Which cache an example is: the first ``cache_size`` tokens of a sequence, both counted within the split."""

    example: int
    sequence: int
    sample_id: str
    cache_size: int


@dataclass(frozen=True)
class LayerRows:
    """What is stored of one layer of an example, on the CPU.

    Attributes
    ----------
    kv_head, position
        (rows,) int64, of each known token; KV heads one after the other, positions ascending.
    importance, probability
        (rows,) float32: future importance, and the probability with which the token was to be known.
    keys, values
        (rows, head_dim) float16.
    all_importance
        (kv_heads, cache_size) float32, of all tokens.
    best_cost
        (kv_heads,) float32.
    """

    kv_head: Tensor
    position: Tensor
    importance: Tensor
    probability: Tensor
    keys: Tensor
    values: Tensor
    all_importance: Tensor
    best_cost: Tensor


def marker(root: Path, split: str, shard: int) -> Path:
    """What tells that a shard was completely written: it is written last."""
    return root / split / f"shard-{shard:05d}.json"


class ShardWriter:
    """Writes one shard: two files per layer, then the marker. Layers may be written from several threads.

    A context: the files appear under their names when it ends, and none is left where it ends with an error.

    Raises
    ------
    PipelineError
        The disk is full.
    """

    def __init__(self, root: Path, split: str, shard: int, shape: TraceShape) -> None:
        self.root, self.split, self.shard, self.shape = root, split, shard, shape
        self.examples: list[ExampleInfo] = []
        self._schemas = shape.schemas()
        self._writers: dict[tuple[int, str], tuple[Path, pq.ParquetWriter]] = {}

    def __enter__(self) -> "ShardWriter":
        with disk_errors(self.root / self.split):
            for layer in self.shape.layer_numbers:
                directory = self.root / self.split / f"layer={layer:02d}"
                directory.mkdir(parents=True, exist_ok=True)
                for name in FILES:
                    # Its own, as another process may be writing the same shard.
                    path = temporary_name(directory / f"{name}-{self.shard:05d}")
                    self._writers[layer, name] = path, _open_writer(path, self._schemas[name])
        return self

    def write_layer(self, layer: int, info: ExampleInfo, rows: LayerRows) -> None:
        """Append one layer (its number in the model) of an example: the examples of a layer in their order."""
        kv_heads = len(rows.best_cost)
        heads = {
            "kv_head": torch.arange(kv_heads),
            "best_cost": rows.best_cost,
            "importance": pa.ListArray.from_arrays(
                pa.array(np.arange(kv_heads + 1, dtype=np.int32) * info.cache_size),
                pa.array(rows.all_importance.flatten().numpy()),
            ),
        }
        tokens = {
            "kv_head": rows.kv_head,
            "position": rows.position,
            "importance": rows.importance,
            "probability": rows.probability,
            "key": self._vectors(rows.keys),
            "value": self._vectors(rows.values),
        }
        for name, columns, count in (("tokens", tokens, len(rows.kv_head)), ("heads", heads, kv_heads)):
            schema = self._schemas[name]
            labels = {"example": info.example, "sequence": info.sequence, "cache_size": info.cache_size}
            columns |= {label: torch.full((count,), value) for label, value in labels.items()}
            arrays = [
                pa.array(columns[field.name].numpy()).cast(field.type)
                if isinstance(columns[field.name], Tensor)
                else columns[field.name]
                for field in schema
            ]
            with disk_errors(self.root / self.split):
                self._writers[layer, name][1].write_table(
                    pa.Table.from_arrays(arrays, schema=schema), row_group_size=max(1, count)
                )

    def _vectors(self, states: Tensor) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(states.contiguous().flatten().numpy()), self.shape.head_dim)

    def __exit__(self, kind: object, *_: object) -> None:
        with disk_errors(self.root / self.split):
            for _path, open_file in self._writers.values():
                open_file.close()
            if kind is not None:
                for path, _writer in self._writers.values():
                    path.unlink(missing_ok=True)
                return
            with ThreadPoolExecutor() as pool:  # hashing lets other threads run
                files = list(pool.map(self._finish, self._writers))
            write_json(
                marker(self.root, self.split, self.shard), {"examples": list(map(vars, self.examples)), "files": files}
            )

    def _finish(self, key: tuple[int, str]) -> dict[str, Any]:
        layer, name = key
        final = _file(self.root, self.split, layer, name, self.shard)
        self._writers[key][0].replace(final)
        return {"path": str(final.relative_to(self.root)), "sha256": hash_file(final), "bytes": final.stat().st_size}


def write_manifest(root: Path, shape: TraceShape, splits: dict[str, int]) -> None:
    """Gather the commit markers into manifest.json; what a killed process left half-written goes.

    Parameters
    ----------
    splits
        split -> number of shards.
    """
    remove_unfinished(root)
    content: dict[str, Any] = {"shape": vars(shape), "splits": {}}
    for split, shards in splits.items():
        content["splits"][split] = [json.loads(marker(root, split, shard).read_text()) for shard in range(shards)]
    write_json(root / MANIFEST, content)


def remove_unfinished(root: Path) -> None:
    """Remove temporary files of killed processes from a directory that is complete, and so about to be published."""
    for path in list(root.rglob(".*.tmp")):
        remove(path)


def _file(root: Path, split: str, layer: int, name: str, shard: int) -> Path:
    return root / split / f"layer={layer:02d}" / f"{name}-{shard:05d}.parquet"


def _open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # What is constant within a row group or a head takes no room as a dictionary. The first bytes of numbers, with
    # their exponents, are alike: side by side, they let a compressor take a tenth off keys and values.
    labels = [name for name in _LABELS if name in schema.names]
    numbers = [
        f"{field.name}.list.element" if pa.types.is_nested(field.type) else field.name
        for field in schema
        if field.name not in labels
    ]
    encodings = {
        name: "DELTA_BINARY_PACKED" if schema.field(name.split(".")[0]).type == pa.int32() else "BYTE_STREAM_SPLIT"
        for name in numbers
    }
    return pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=labels, write_statistics=labels,
        column_encoding=encodings, version="2.6",
    )  # fmt: skip


def as_float16(states: Tensor, sample_id: str, layer: int, name: str) -> Tensor:
    """The states in float16; a PipelineError that names ``name`` where one is not finite, or does not fit."""
    half = states.to(torch.float16)
    if not torch.isfinite(half).all():
        place = f"Sample {sample_id}, layer {layer}: a {name}"
        if not torch.isfinite(states).all():
            dtype = str(states.dtype).removeprefix("torch.")
            others = " or ".join(other for other in ("bfloat16", "float32") if other != dtype)
            raise PipelineError(
                f"{place} is not finite: the model overflows in {dtype}; set models.*.dtype in params.yaml to {others}."
            )
        raise PipelineError(
            f"{place} is outside the range of float16 (largest magnitude {states.abs().max().item():.3g}); traces "
            "are stored in half precision, which cannot hold this cache."
        )
    return half


class ExampleReader:
    """Reads the examples of one split through a bounded memory; from several threads.

    Parameters
    ----------
    root
        A directory with a manifest.json.
    cache_bytes
        How much decoded data to keep; the least recently used is dropped first. A run-time resource,
        no parameter of the result.
    layers, sequences
        Numbers of layers and indices of sequences to restrict the reader to, layers in this order; None for all.
        ``shape`` and ``examples`` then describe the restriction.

    Raises
    ------
    PipelineError
        The manifest is missing or unreadable, the split has no sequences, or a layer does not exist.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        cache_bytes: int,
        layers: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
    ) -> None:
        try:
            manifest = json.loads((root / MANIFEST).read_text())
            self.shape = TraceShape(**manifest["shape"])
            shards = manifest["splits"][split]
            found = [
                (ExampleInfo(**entry), shard, group)
                for shard, content in enumerate(shards)
                for group, entry in enumerate(content["examples"])
            ]
            self._checksums = {file["path"]: file["sha256"] for content in shards for file in content["files"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(f"{root / MANIFEST} cannot be read ({error}); run the traces stage again.") from None
        if not found:
            raise PipelineError(f"{root}: the split {split} has no sequences; raise its sizes.{split} in params.yaml.")
        if sequences is not None:
            found = [entry for entry in found if entry[0].sequence in set(sequences)]
        self.root, self.split = root, split
        self.examples = [info for info, _, _ in found]
        self._places = [(shard, group) for _, shard, group in found]
        captured = self.shape.layer_numbers
        wanted = captured if layers is None else tuple(layers)
        if absent := sorted(set(wanted) - set(captured)):
            raise PipelineError(
                f"{root}: the traces have layers {', '.join(map(str, captured))}, not {absent[0]}; name others."
            )
        self.shape = replace(self.shape, layer_numbers=wanted)
        # Of a layer's shard, once it was checked: the metadata of its tokens, and the best costs of its examples.
        self._open: dict[tuple[int, int], tuple[pq.FileMetaData, Tensor]] = {}
        self._memory: OrderedDict[int, RankingExample] = OrderedDict()
        self._memory_bytes, self._cache_bytes = 0, cache_bytes
        self._lock = threading.Lock()

    @property
    def sequences(self) -> int:
        """How many sequences the examples come from."""
        return len({info.sequence for info in self.examples})

    def read(self, index: int) -> RankingExample:
        """One of ``examples``, all layers stacked: heads = layers x kv_heads, layer-major."""
        with self._lock:
            if index in self._memory:
                self._memory.move_to_end(index)
                return self._memory[index]
        example = self._read(index)
        with self._lock:
            if index in self._memory:  # another thread was faster, and its bytes are counted
                return self._memory[index]
            self._memory[index] = example
            self._memory_bytes += _bytes(example)
            while self._memory_bytes > self._cache_bytes and len(self._memory) > 1:
                _, dropped = self._memory.popitem(last=False)
                self._memory_bytes -= _bytes(dropped)
        return example

    def _read(self, index: int) -> RankingExample:
        shape, info = self.shape, self.examples[index]
        layers = [self._layer(layer, *self._places[index]) for layer in shape.layer_numbers]
        counts = [torch.bincount(_numbers(table["kv_head"]).long(), minlength=shape.kv_heads) for table, _ in layers]
        width = int(torch.stack(counts).max())
        heads = shape.layers * shape.kv_heads
        known = (torch.arange(width) < torch.cat(counts)[:, None]).flatten()

        def gather(column: str, *last: int) -> Tensor:
            found = torch.cat([_numbers(table[column]) for table, _ in layers])
            filled = found.new_zeros(heads * width, *last)
            filled[known] = found.view(-1, *last)
            return filled.view(heads, width, *last)

        probability = gather("probability")
        return RankingExample(
            info.cache_size,
            gather("key", shape.head_dim),
            gather("value", shape.head_dim),
            gather("position"),
            gather("importance"),
            torch.where(probability > 0, 1 / probability, 0),
            torch.cat([best for _, best in layers]),
        )

    def _layer(self, layer: int, shard: int, group: int) -> tuple[pa.Table, Tensor]:
        """Rows of one layer of an example, and its best costs (kv_heads,)."""
        path = _file(self.root, self.split, layer, "tokens", shard)
        try:
            metadata, best = self._checked(layer, shard)
            # Opened here: a reader of many shards must not hold all of them open.
            with pq.ParquetFile(path, metadata=metadata, memory_map=True) as file:
                return file.read_row_group(group, use_threads=False), best[group]
        except (OSError, RuntimeError, pa.ArrowException) as error:
            raise PipelineError(f"{path} is damaged ({error}); run the traces stage again.") from None

    def _checked(self, layer: int, shard: int) -> tuple[pq.FileMetaData, Tensor]:
        # Once per file, on first use: a flipped bit in a float would otherwise train silently.
        with self._lock:
            if (layer, shard) in self._open:
                return self._open[layer, shard]
        tokens, heads = (_file(self.root, self.split, layer, name, shard) for name in FILES)
        for path in (tokens, heads):
            if not path.is_file():
                raise PipelineError(f"{path} is missing; run the traces stage again.")
            if hash_file(path) != self._checksums[str(path.relative_to(self.root))]:
                raise PipelineError(
                    f"{path} does not match its checksum: it was cut or changed; run the traces stage again."
                )
        best = _numbers(pq.read_table(heads, columns=["best_cost"])["best_cost"]).view(-1, self.shape.kv_heads)
        with self._lock:
            return self._open.setdefault((layer, shard), (pq.read_metadata(tokens), best))


def _bytes(example: RankingExample) -> int:
    return sum(field.nbytes for field in vars(example).values() if isinstance(field, Tensor))


def _numbers(column: pa.ChunkedArray) -> Tensor:
    """The numbers of a column, those of its vectors one after the other."""
    chunks: Iterable[Any] = [
        chunk.flatten() if pa.types.is_fixed_size_list(column.type) else chunk for chunk in column.chunks
    ]
    return torch.from_numpy(np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks]))
