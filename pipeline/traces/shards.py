"""Traces on disk: Parquet shards, partitioned by layer, resumable and checksummed. It runs no model.

    <root>/manifest.json                       everything a reader needs, and the checksum of each file
    <root>/<split>/shard-00000.json            commit marker of a shard, written after its files
    <root>/<split>/layer=07/shard-00000.parquet

One row is one token of one KV head; one row group is one (sequence, KV head), so a reader touches only
the bytes of the head and sequence it asks for. Keys, values and the packed future-attention record are
float16, plainly encoded, so that a reader copies them from the file as they are. Bytes are reproducible: no
timestamps, fixed encodings, pinned pyarrow.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.files import disk_errors, hash_file, remove, write_json
from pipeline.traces.importance import pack_record, record_entries, record_lengths, unpack_record
from pipeline.traces.pages import plain_values

if TYPE_CHECKING:
    from pipeline.traces.capture import LayerTrace

MANIFEST = "manifest.json"
# Larger than a row group, whose vectors then lie in one page and are read without Arrow (pipeline/traces/pages.py).
_ONE_PAGE = 1 << 30
_VECTORS = ("key", "value", "future_attention")


@dataclass(frozen=True)
class TraceShape:
    """What all shards of one directory share.

    ``layer_numbers`` are the model's numbers of the ``layers`` captured ones, all of them where none are given.
    """

    model: str
    benchmark: str
    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    layer_numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # A manifest holds a list; one written before a model could have other layers holds none.
        object.__setattr__(self, "layer_numbers", tuple(self.layer_numbers or range(self.layers)))

    def schema(self) -> pa.Schema:
        """Arrow schema of a shard file."""
        vector = pa.list_(pa.float16(), self.head_dim)
        return pa.schema(
            [
                ("sequence", pa.int32()),
                ("kv_head", pa.int16()),
                ("position", pa.int32()),
                ("key", vector),
                ("value", vector),
                ("future_attention", pa.list_(pa.float16())),
            ]
        )


def shard_name(shard: int) -> str:
    """File stem of a shard."""
    return f"shard-{shard:05d}"


def is_committed(root: Path, split: str, shard: int) -> bool:
    """Whether a shard was completely written before (its marker is written last)."""
    return (root / split / f"{shard_name(shard)}.json").is_file()


def write_shard(
    root: Path,
    split: str,
    shard: int,
    shape: TraceShape,
    sequences: Iterable[tuple[int, str, list["LayerTrace"]]],
) -> None:
    """Write one shard: a file per layer, then the commit marker.

    Parameters
    ----------
    sequences
        (index within the split, sample id, one trace per layer); consumed one at a time, so memory holds
        a single sequence.

    Raises
    ------
    PipelineError
        A key or value is not finite or does not fit float16, or the disk is full. No marker is left in either case.
    """
    schema = shape.schema()
    directory = root / split
    # With the process, as another may be writing the same shard.
    name = f".{shard_name(shard)}.{os.getpid()}.tmp"
    temporary = [directory / f"layer={layer:02d}" / name for layer in shape.layer_numbers]
    written: list[dict[str, Any]] = []
    with disk_errors(directory):
        writers: list[pq.ParquetWriter] = []
        try:
            for path in temporary:
                path.parent.mkdir(parents=True, exist_ok=True)
                writers.append(_open_writer(path, schema))
            for group, (index, sample_id, layers) in enumerate(sequences):
                for layer, writer, trace in zip(shape.layer_numbers, writers, layers, strict=True):
                    for table in _tables(index, sample_id, layer, trace, shape, schema):
                        writer.write_table(table, row_group_size=table.num_rows)
                written.append(
                    {"sequence": index, "sample_id": sample_id, "tokens": layers[0].keys.shape[1], "group": group}
                )
        except BaseException:
            for writer in writers:
                writer.close()
            for path in temporary:
                path.unlink(missing_ok=True)
            raise
        for writer in writers:
            writer.close()
        files = []
        for path in temporary:
            final = path.with_name(f"{shard_name(shard)}.parquet")
            path.replace(final)
            files.append(
                {"path": str(final.relative_to(root)), "sha256": hash_file(final), "bytes": final.stat().st_size}
            )
        rows = shape.kv_heads * sum(entry["tokens"] for entry in written)
        write_json(
            directory / f"{shard_name(shard)}.json", {"sequences": written, "files": files, "rows_per_file": rows}
        )


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
        markers = [root / split / f"{shard_name(shard)}.json" for shard in range(shards)]
        content["splits"][split] = [json.loads(marker.read_text()) for marker in markers]
    write_json(root / MANIFEST, content)


def remove_unfinished(root: Path) -> None:
    """Remove temporary files of killed processes from a directory that is complete, and so about to be published."""
    for path in list(root.rglob(".*.tmp")):
        remove(path)


def _open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Float16 keys and values are noise to a compressor; statistics over them are of no use to a reader. Sequence and
    # head are constant within a row group, positions grow by one: as dictionary and differences they take no room.
    labels = ["sequence", "kv_head"]
    return pq.ParquetWriter(
        path,
        schema,
        compression="none",
        use_dictionary=labels,
        column_encoding={"position": "DELTA_BINARY_PACKED"},
        write_statistics=labels,
        version="2.6",
        data_page_size=_ONE_PAGE,
        max_rows_per_page=_ONE_PAGE,
    )


def _tables(
    index: int, sample_id: str, layer: int, trace: "LayerTrace", shape: TraceShape, schema: pa.Schema
) -> Iterable[pa.Table]:
    tokens = trace.keys.shape[1]
    keys = as_float16(trace.keys, sample_id, layer, "key")
    values = as_float16(trace.values, sample_id, layer, "value")
    packed = pack_record(trace.record.cpu(), shape.block_size).to(torch.float16).numpy()
    offsets = np.concatenate([[0], record_lengths(tokens, shape.block_size).cumsum(0).numpy()]).astype(np.int32)
    for kv_head in range(shape.kv_heads):
        yield pa.Table.from_arrays(
            [
                pa.array(np.full(tokens, index, np.int32)),
                pa.array(np.full(tokens, kv_head, np.int16)),
                pa.array(np.arange(tokens, dtype=np.int32)),
                pa.FixedSizeListArray.from_arrays(pa.array(keys[kv_head].reshape(-1)), shape.head_dim),
                pa.FixedSizeListArray.from_arrays(pa.array(values[kv_head].reshape(-1)), shape.head_dim),
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(packed[kv_head])),
            ],
            schema=schema,
        )


def as_float16(states: Tensor, sample_id: str, layer: int, name: str) -> np.ndarray[Any, Any]:
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
    return half.cpu().numpy()


@dataclass(frozen=True)
class SequenceInfo:
    """Where one sequence lies: ``group`` is its index within the shard."""

    sample_id: str
    tokens: int
    shard: int
    group: int


# Row group -> offsets of its keys, values and future attention in the file; None where only Arrow can read them.
_Offsets: TypeAlias = list[list[int]] | None


class TraceReader:
    """Reads traces of one split, layer by layer and sequence by sequence, through a bounded memory.

    Parameters
    ----------
    root
        A directory with a manifest.json.
    cache_bytes
        How much decoded data to keep; the least recently used is dropped first. A run-time resource,
        no parameter of the result.
    layers, sequences
        Numbers of layers and indices of sequences to restrict the reader to, in this order; None for all.
        ``shape`` and ``sequences`` then describe the restriction.

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
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(f"{root / MANIFEST} cannot be read ({error}); run the traces stage again.") from None
        self.root, self.split = root, split
        self.sequences = [
            SequenceInfo(entry["sample_id"], entry["tokens"], shard, entry["group"])
            for shard, content in enumerate(shards)
            for entry in content["sequences"]
        ]
        if not self.sequences:
            raise PipelineError(f"{root}: the split {split} has no sequences; raise its sizes.{split} in params.yaml.")
        if sequences is not None:
            self.sequences = [self.sequences[index] for index in sequences]
        captured = self.shape.layer_numbers
        wanted = captured if layers is None else tuple(layers)
        if absent := sorted(set(wanted) - set(captured)):
            raise PipelineError(
                f"{root}: the traces have layers {', '.join(map(str, captured))}, not {absent[0]}; name others."
            )
        self.shape = replace(self.shape, layers=len(wanted), layer_numbers=wanted)
        self._tokens = [[entry["tokens"] for entry in content["sequences"]] for content in shards]
        self._checksums = {file["path"]: file["sha256"] for content in shards for file in content["files"]}
        self._values: dict[tuple[int, int], _Offsets] = {}
        self._memory: OrderedDict[int, tuple[Tensor, Tensor, Tensor]] = OrderedDict()
        self._memory_bytes, self._cache_bytes = 0, cache_bytes
        self._lock = threading.Lock()

    def read_layer(self, layer: int, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (kv_heads, n, head_dim) and record (kv_heads, n, blocks) of a layer (its number), float16."""
        return self._read((layer,), sequence)

    def read(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """All layers of one sequence, stacked: heads = layers x kv_heads comes first, layer-major."""
        with self._lock:
            if sequence in self._memory:
                self._memory.move_to_end(sequence)
                return self._memory[sequence]
        tensors = self._read(self.shape.layer_numbers, sequence)
        with self._lock:
            if sequence in self._memory:  # another thread was faster, and its bytes are counted
                self._memory.move_to_end(sequence)
                return self._memory[sequence]
            self._memory[sequence] = tensors
            self._memory_bytes += sum(tensor.nbytes for tensor in tensors)
            while self._memory_bytes > self._cache_bytes and len(self._memory) > 1:
                _, dropped = self._memory.popitem(last=False)
                self._memory_bytes -= sum(tensor.nbytes for tensor in dropped)
        return tensors

    def _read(self, layers: Sequence[int], sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        info, shape = self.sequences[sequence], self.shape
        self._check(layers, info.shard)
        heads = (len(layers), shape.kv_heads)
        keys, values = (torch.empty(*heads, info.tokens, shape.head_dim, dtype=torch.float16) for _ in range(2))
        packed = torch.empty(*heads, record_entries(info.tokens, shape.block_size), dtype=torch.float16)
        for layer, *targets in zip(layers, keys, values, packed, strict=True):
            self._fill(layer, info, targets)
        record = unpack_record(packed.flatten(0, 1), info.tokens, shape.block_size)
        return keys.flatten(0, 1), values.flatten(0, 1), record

    def _fill(self, layer: int, info: SequenceInfo, targets: Sequence[Tensor]) -> None:
        """Read one layer of one sequence into key, value and packed record, (kv_heads, ...) each."""
        path, offsets = self._path(layer, info.shard), self._values[layer, info.shard]
        first = info.group * self.shape.kv_heads
        groups = range(first, first + self.shape.kv_heads)
        try:
            if offsets is None:
                # Opened here: a reader of many shards must not hold all of them open.
                with pq.ParquetFile(path, memory_map=True) as file:
                    table = file.read_row_groups(list(groups), columns=list(_VECTORS), use_threads=False)
                for name, target in zip(_VECTORS, targets, strict=True):
                    target.view(-1).copy_(_flat(table[name]))
            else:
                with path.open("rb", buffering=0) as stream:
                    for group, *vectors in zip(groups, *targets, strict=True):
                        for offset, vector in zip(offsets[group], vectors, strict=True):
                            _copy(stream.fileno(), offset, vector)
        except (OSError, RuntimeError, pa.ArrowException) as error:
            raise PipelineError(f"{path} is damaged ({error}); run the traces stage again.") from None

    def _path(self, layer: int, shard: int) -> Path:
        return self.root / self.split / f"layer={layer:02d}" / f"{shard_name(shard)}.parquet"

    def _check(self, layers: Sequence[int], shard: int) -> None:
        # Once per file, on first use: a flipped bit in a float would otherwise train silently.
        with self._lock:
            unchecked = [layer for layer in layers if (layer, shard) not in self._values]
            if unchecked:
                # Hashing takes longer than reading, and lets other threads run.
                with ThreadPoolExecutor(min(len(unchecked), os.cpu_count() or 1)) as pool:
                    located = list(pool.map(lambda layer: self._locate(layer, shard), unchecked))
                self._values |= {(layer, shard): offsets for layer, offsets in zip(unchecked, located, strict=True)}

    def _locate(self, layer: int, shard: int) -> _Offsets:
        """Check a file, and find the values of its vectors."""
        path = self._path(layer, shard)
        if not path.is_file():
            raise PipelineError(f"{path} is missing; run the traces stage again.")
        if hash_file(path) != self._checksums[str(path.relative_to(self.root))]:
            raise PipelineError(
                f"{path} does not match its checksum: it was cut or changed; run the traces stage again."
            )
        return _value_offsets(path, self.shape, self._tokens[shard])


def _value_offsets(path: Path, shape: TraceShape, tokens: Sequence[int]) -> _Offsets:
    """Where the values of each row group of a file lie, or None if some can only be read by Arrow.

    Parameters
    ----------
    tokens
        Of each sequence in the file; a sequence is ``shape.kv_heads`` row groups.
    """
    offsets: list[list[int]] = []
    metadata = pq.read_metadata(path)
    columns = {metadata.schema.column(index).path.partition(".")[0]: index for index in range(metadata.num_columns)}
    with path.open("rb", buffering=0) as stream:
        for group in range(metadata.num_row_groups):
            length = tokens[group // shape.kv_heads]
            vector = 2 * length * shape.head_dim
            sizes = (vector, vector, 2 * record_entries(length, shape.block_size))
            chunks = metadata.row_group(group)
            offsets.append([])
            for name, size in zip(_VECTORS, sizes, strict=True):
                offset = plain_values(stream, chunks.column(columns[name]), size)
                if offset is None:
                    return None
                offsets[-1].append(offset)
    return offsets


def _copy(descriptor: int, offset: int, target: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of a file from ``offset`` on."""
    array: Any = target.numpy()
    wanted = memoryview(array.reshape(-1).view(np.uint8))
    while wanted:
        count = os.preadv(descriptor, [wanted], offset)
        if not count:
            raise OSError("it is shorter than when it was checked")
        wanted, offset = wanted[count:], offset + count


def _flat(column: pa.ChunkedArray) -> Tensor:
    chunks: Sequence[Any] = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    return torch.from_numpy(np.concatenate(chunks))
