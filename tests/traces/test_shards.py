"""Shards: what is written is read back, in the same bytes, or refused with one sentence."""

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.files import hash_file
from pipeline.traces import shards
from pipeline.traces.capture import LayerTrace
from pipeline.traces.shards import TraceReader, TraceShape, is_committed, write_manifest, write_shard

SHAPE = TraceShape("tiny", "ruler", layers=2, kv_heads=3, head_dim=4, block_size=8)


def random_traces(tokens: int, seed: int, scale: float = 1.0) -> list[LayerTrace]:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // SHAPE.block_size)
    return [
        LayerTrace(
            torch.randn(3, tokens, 4, generator=generator) * scale,
            torch.randn(3, tokens, 4, generator=generator),
            torch.rand(3, tokens, blocks, generator=generator),
        )
        for _ in range(SHAPE.layers)
    ]


def write(root: Path) -> list[list[LayerTrace]]:
    sequences = [random_traces(tokens, seed) for seed, tokens in enumerate((20, 33, 17))]
    write_shard(root, "train", 0, SHAPE, [(0, "a", sequences[0]), (1, "b", sequences[1])])
    write_shard(root, "train", 1, SHAPE, [(2, "c", sequences[2])])
    write_manifest(root, SHAPE, {"train": 2})
    return sequences


def test_reading_returns_what_was_written(tmp_path: Path) -> None:
    sequences = write(tmp_path)
    reader = TraceReader(tmp_path, "train", cache_bytes=0)
    assert [sequence.tokens for sequence in reader.sequences] == [20, 33, 17]
    for index, traces in enumerate(sequences):
        keys, values, record = reader.read(index)
        assert keys.shape == (6, traces[0].keys.shape[1], 4)
        for layer, trace in enumerate(traces):
            heads = slice(layer * 3, layer * 3 + 3)
            torch.testing.assert_close(keys[heads], trace.keys.half(), rtol=0, atol=0)
            torch.testing.assert_close(values[heads], trace.values.half(), rtol=0, atol=0)
            cut = trace.keys.shape[1] // 8 * 8
            for cache_size in range(8, cut + 1, 8):
                torch.testing.assert_close(
                    record[heads, :cache_size, cache_size // 8 :],
                    trace.record[:, :cache_size, cache_size // 8 :].half(),
                    rtol=0,
                    atol=0,
                )


def tiny_file(root: Path) -> Path:
    return root / "train" / "layer=01" / "shard-00000.parquet"


def rewrite(root: Path, **options: Any) -> None:
    """Store one file of a directory again, in other pages, as other versions or programs might have."""
    path = tiny_file(root)
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
    with pq.ParquetWriter(path, file.schema_arrow, **options) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=group.num_rows)
    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["splits"]["train"][0]["files"]:
        if entry["path"] == str(path.relative_to(root)):
            entry["sha256"] = hash_file(path)
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("options", "direct"),
    [
        ({"compression": "none", "use_dictionary": False}, True),  # how shards were written at first
        ({"compression": "none", "use_dictionary": False, "data_page_size": 64, "write_batch_size": 4}, False),
        ({"compression": "zstd"}, False),
    ],
)
def test_files_in_other_pages_are_read_as_well(options: dict[str, Any], direct: bool, tmp_path: Path) -> None:
    write(tmp_path)
    expected = [TraceReader(tmp_path, "train", cache_bytes=0).read(index) for index in range(3)]
    rewrite(tmp_path, **options)
    reader = TraceReader(tmp_path, "train", cache_bytes=0)
    for index, tensors in enumerate(expected):
        for ours, theirs in zip(reader.read(index), tensors, strict=True):
            assert torch.equal(ours, theirs)
    assert (reader._values[1, 0] is not None) == direct


@pytest.mark.parametrize(("tokens", "head_dim"), [(9000, 64), (21_000, 2)])
def test_long_sequences_are_read_without_arrow(tokens: int, head_dim: int, tmp_path: Path) -> None:
    # Parquet would begin another page after a megabyte, or 20,000 rows.
    shape = TraceShape("tiny", "ruler", layers=1, kv_heads=1, head_dim=head_dim, block_size=4096)
    blocks = -(-tokens // 4096)
    trace = LayerTrace(
        torch.randn(1, tokens, head_dim), torch.randn(1, tokens, head_dim), torch.rand(1, tokens, blocks)
    )
    write_shard(tmp_path, "train", 0, shape, [(0, "a", [trace])])
    write_manifest(tmp_path, shape, {"train": 1})
    reader = TraceReader(tmp_path, "train", cache_bytes=0)
    keys, values, record = reader.read(0)
    assert reader._values[0, 0] is not None
    assert torch.equal(keys, trace.keys.half())
    assert torch.equal(values, trace.values.half())
    assert torch.equal(record[:, :4096, 1:], trace.record[:, :4096, 1:].half())


def test_a_file_that_is_cut_after_it_was_checked_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    reader = TraceReader(tmp_path, "train", cache_bytes=0)
    reader.read(0)
    os.truncate(tiny_file(tmp_path), 300)
    with pytest.raises(PipelineError, match=r"layer=01/shard-00000\.parquet is damaged .*shorter"):
        reader.read(1)


def test_the_schema_is_that_of_the_columns(tmp_path: Path) -> None:
    write(tmp_path)
    assert pq.read_schema(tiny_file(tmp_path)).equals(SHAPE.schema())
    assert pl.read_parquet_schema(tiny_file(tmp_path)) == {
        "sequence": pl.Int32,
        "kv_head": pl.Int16,
        "position": pl.Int32,
        "key": pl.Array(pl.Float16, 4),
        "value": pl.Array(pl.Float16, 4),
        "future_attention": pl.List(pl.Float16),
    }


def test_layers_carry_the_models_numbers(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, layer_numbers=(5, 11))
    traces = random_traces(20, 0)
    write_shard(tmp_path, "train", 0, shape, [(0, "a", traces)])
    write_manifest(tmp_path, shape, {"train": 1})
    assert sorted(path.name for path in (tmp_path / "train").glob("layer=*")) == ["layer=05", "layer=11"]
    reader = TraceReader(tmp_path, "train", cache_bytes=0)
    assert reader.shape == shape
    assert torch.equal(reader.read_layer(11, 0)[0], traces[1].keys.half())
    assert torch.equal(reader.read(0)[0][3:], traces[1].keys.half())


def test_polars_reads_one_head_lazily(tmp_path: Path) -> None:
    sequences = write(tmp_path)
    frame = (
        pl.scan_parquet(tmp_path / "train" / "layer=01" / "*.parquet", hive_partitioning=False)
        .filter((pl.col("sequence") == 1) & (pl.col("kv_head") == 2))
        .select("position", "key")
        .collect()
    )
    assert frame["position"].to_list() == list(range(33))
    torch.testing.assert_close(torch.tensor(frame["key"].to_list()), sequences[1][1].keys[2].half().float())


def test_one_row_group_per_sequence_and_head(tmp_path: Path) -> None:
    write(tmp_path)
    file = pq.ParquetFile(tmp_path / "train" / "layer=00" / "shard-00000.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [20] * 3 + [33] * 3


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / name)
    for file in sorted((tmp_path / "first").rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "second" / file.relative_to(tmp_path / "first")).read_bytes()


def test_a_reader_of_some_layers_and_sequences_is_a_part_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path)
    whole = TraceReader(tmp_path, "train", cache_bytes=0)
    part = TraceReader(tmp_path, "train", cache_bytes=0, layers=[1], sequences=[2, 0])
    assert [sequence.sample_id for sequence in part.sequences] == ["c", "a"]
    assert part.shape == dataclasses.replace(SHAPE, layers=1, layer_numbers=(1,))
    for index, original in enumerate((2, 0)):
        for ours, theirs in zip(part.read(index), whole.read(original), strict=True):
            assert torch.equal(ours, theirs[3:])


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(PipelineError, match=r"the traces have layers 0, 1, not 2; name others\."):
        TraceReader(tmp_path, "train", 0, layers=[0, 2])


def test_memory_is_bounded(tmp_path: Path) -> None:
    write(tmp_path)
    reader = TraceReader(tmp_path, "train", cache_bytes=1)
    for index in range(3):
        reader.read(index)
        assert len(reader._memory) == 1


def test_an_interrupted_shard_leaves_no_marker_and_no_files(tmp_path: Path) -> None:
    def interrupted():
        yield 0, "a", random_traces(20, 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "train", 0, SHAPE, interrupted())
    assert not is_committed(tmp_path, "train", 0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"Sample big, layer 0: a key is outside the range of float16"):
        write_shard(tmp_path, "train", 0, SHAPE, [(0, "big", random_traces(20, 0, scale=1e6))])
    assert not is_committed(tmp_path, "train", 0)


@pytest.mark.parametrize(("dtype", "others"), [(torch.bfloat16, "float32"), (torch.float16, "bfloat16 or float32")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_model_that_overflows_is_told_from_values_beyond_float16(dtype: torch.dtype, others: str, bad: float) -> None:
    states = torch.ones(2, 5, 4, dtype=dtype)
    assert shards.as_float16(states, "s", 3, "value").dtype == np.float16
    states[1, 2, 3] = bad
    name = str(dtype).removeprefix("torch.")
    message = rf"^Sample s, layer 3: a value is not finite: the model overflows in {name}; .* to {others}\.$"
    with pytest.raises(PipelineError, match=message):
        shards.as_float16(states, "s", 3, "value")


def test_leftovers_of_a_killed_process_are_not_published(tmp_path: Path) -> None:
    seen: list[str] = []

    def sequences() -> Iterator[tuple[int, str, list[LayerTrace]]]:
        yield 0, "a", random_traces(20, 0)
        seen.extend(path.name for path in tmp_path.rglob(".*"))

    (tmp_path / "train/layer=01").mkdir(parents=True)
    killed = tmp_path / "train/layer=01/.shard-00000.1.tmp"
    killed.write_bytes(b"half")
    (tmp_path / ".manifest.json.1.tmp").write_bytes(b"half")
    write_shard(tmp_path, "train", 0, SHAPE, sequences())
    # Another process may be at work on the same shard: its file is neither written into nor taken away.
    assert sorted(set(seen) - {killed.name, ".manifest.json.1.tmp"}) == [f".shard-00000.{os.getpid()}.tmp"]
    assert killed.read_bytes() == b"half"
    write_manifest(tmp_path, SHAPE, {"train": 1})
    assert not list(tmp_path.rglob(".*"))


def test_concurrent_misses_count_their_bytes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    reader = TraceReader(tmp_path, "train", cache_bytes=1 << 30)
    both = threading.Barrier(2)

    def read(*arguments: Any) -> tuple[torch.Tensor, ...]:
        both.wait(timeout=60)  # both have missed before either has read
        return TraceReader._read(reader, *arguments)

    monkeypatch.setattr(reader, "_read", read)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(reader.read, (0, 0))
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert reader._memory_bytes == sum(tensor.nbytes for tensor in first)


def test_a_full_disk_gives_one_sentence_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shards._open_writer

    class FullDisk:
        def __init__(self, *arguments: object) -> None:
            self.writer = real(*arguments)  # type: ignore[arg-type]

        def write_table(self, *arguments: object, **options: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.writer.close()

    monkeypatch.setattr(shards, "_open_writer", FullDisk)
    with pytest.raises(PipelineError, match=r"No space is left on the disk while writing .*train"):
        write_shard(tmp_path, "train", 0, SHAPE, [(0, "a", random_traces(20, 0))])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    path = tmp_path / "train" / "layer=01" / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    reader = TraceReader(tmp_path, "train", cache_bytes=0)
    with pytest.raises(PipelineError, match=r"layer=01/shard-00000\.parquet .*run the traces stage again"):
        reader.read(0)


def test_a_missing_or_broken_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"manifest\.json cannot be read"):
        TraceReader(tmp_path, "train", 0)
    (tmp_path / "manifest.json").write_text(json.dumps({"shape": {}}))
    with pytest.raises(PipelineError, match=r"manifest\.json cannot be read"):
        TraceReader(tmp_path, "train", 0)
