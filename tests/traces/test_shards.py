"""Shards: what is written is read back, in the same bytes, or refused with one sentence."""

import dataclasses
import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.traces import shards
from pipeline.traces.build import choose_tokens
from pipeline.traces.example import best_cost
from pipeline.traces.shards import ExampleInfo, ExampleReader, ShardWriter, TraceShape, marker, write_manifest
from tests.traces.synthetic import Cache, random_cache, write_traces

SHAPE = TraceShape("tiny", "ruler", (0, 1), kv_heads=3, head_dim=4)
HEADS = SHAPE.layers * SHAPE.kv_heads


def write(root: Path, tokens: int | None = None) -> list[Cache]:
    """Three sequences, the second one cut twice, in two shards."""
    caches = [random_cache(SHAPE, size, seed) for seed, size in enumerate((20, 33, 9, 17))]
    sequences = [[caches[0]], [caches[1], caches[2]], [caches[3]]]
    write_traces(root, SHAPE, {"train": sequences}, tokens, per_shard=2)
    return caches


def test_reading_returns_what_was_written(tmp_path: Path) -> None:
    caches = write(tmp_path)
    reader = ExampleReader(tmp_path, "train", cache_bytes=0)
    assert [(info.cache_size, info.sequence) for info in reader.examples] == [(20, 0), (33, 1), (9, 1), (17, 2)]
    assert reader.sequences == 3
    for index, (keys, values, importance) in enumerate(caches):
        example = reader.read(index)
        assert example.cache_size == importance.shape[-1]
        assert torch.equal(example.keys, keys.flatten(0, 1).half())
        assert torch.equal(example.values, values.flatten(0, 1).half())
        assert torch.equal(example.importance, importance.flatten(0, 1).clamp_min(1e-10))
        assert torch.equal(example.positions, torch.arange(example.cache_size).int().expand(HEADS, -1))
        assert (example.count == 1).all()
        torch.testing.assert_close(example.best_cost, best_cost(importance.flatten(0, 1)))


def test_samples_of_tokens_are_filled_up(tmp_path: Path) -> None:
    caches = write(tmp_path, tokens=6)
    reader = ExampleReader(tmp_path, "train", cache_bytes=0)
    widths = set()
    for index, (keys, _, importance) in enumerate(caches):
        example = reader.read(index)
        known = example.count > 0
        widths |= set(known.sum(-1).tolist())
        assert known.sum(-1).max() == example.keys.shape[1]
        for head in range(HEADS):
            mine, place = known[head], example.positions[head][known[head]].long()
            assert mine[: mine.sum()].all()
            assert (place.diff() > 0).all()
            assert torch.equal(example.keys[head][mine], keys.flatten(0, 1)[head][place].half())
            assert torch.equal(example.importance[head][mine], importance.flatten(0, 1)[head][place])
            assert (example.count[head][mine] >= 1).all()
            assert not example.keys[head][~mine].any()
        # Of all tokens, not of the known ones.
        torch.testing.assert_close(example.best_cost, best_cost(importance.flatten(0, 1)))
    assert len(widths) > 2


def tiny_file(root: Path, name: str = "tokens") -> Path:
    return root / "train" / "layer=01" / f"{name}-00000.parquet"


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"data_page_size": 64, "write_batch_size": 4}])
def test_files_in_other_pages_are_read_as_well(options: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path)
    expected = [ExampleReader(tmp_path, "train", cache_bytes=0).read(index) for index in range(4)]
    path = tiny_file(tmp_path)
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
    with pq.ParquetWriter(path, file.schema_arrow, **options) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=group.num_rows)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for entry in manifest["splits"]["train"][0]["files"]:
        if entry["path"] == str(path.relative_to(tmp_path)):
            entry["sha256"] = shards.hash_file(path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    reader = ExampleReader(tmp_path, "train", cache_bytes=0)
    for index, example in enumerate(expected):
        assert torch.equal(reader.read(index).keys, example.keys)


def test_a_file_that_is_cut_after_it_was_checked_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ExampleReader(tmp_path, "train", cache_bytes=0)
    reader.read(0)
    os.truncate(tiny_file(tmp_path), 300)
    with pytest.raises(PipelineError, match=r"layer=01/tokens-00000\.parquet is damaged"):
        reader.read(1)


def test_the_schema_is_that_of_the_columns(tmp_path: Path) -> None:
    write(tmp_path)
    head = {"example": pl.Int32, "sequence": pl.Int32, "cache_size": pl.Int32, "kv_head": pl.Int16}
    for name, columns in {
        "tokens": {
            "position": pl.Int32,
            "importance": pl.Float32,
            "probability": pl.Float32,
            "key": pl.Array(pl.Float16, 4),
            "value": pl.Array(pl.Float16, 4),
        },
        "heads": {"best_cost": pl.Float32, "importance": pl.List(pl.Float32)},
    }.items():
        assert pq.read_schema(tiny_file(tmp_path, name)).equals(SHAPE.schemas()[name])
        assert pl.read_parquet_schema(tiny_file(tmp_path, name)) == head | columns


def test_layers_carry_the_models_numbers(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, layer_numbers=(5, 11))
    cache = random_cache(shape, 20, 0)
    write_traces(tmp_path, shape, {"train": [[cache]]})
    assert sorted(path.name for path in (tmp_path / "train").glob("layer=*")) == ["layer=05", "layer=11"]
    reader = ExampleReader(tmp_path, "train", cache_bytes=0)
    assert reader.shape == shape
    assert torch.equal(reader.read(0).keys[3:], cache[0][1].half())


def test_polars_scans_all_layers_lazily(tmp_path: Path) -> None:
    caches = write(tmp_path)
    frame = pl.scan_parquet(tmp_path / "train" / "layer=*" / "tokens-*.parquet", hive_partitioning=True)
    chosen = frame.filter((pl.col("layer") == 1) & (pl.col("example") == 2) & (pl.col("kv_head") == 2))
    found = chosen.select("position", "key").collect()
    assert found["position"].to_list() == list(range(9))
    torch.testing.assert_close(torch.tensor(found["key"].to_list()), caches[2][0][1, 2].half().float())
    heads = pl.scan_parquet(tmp_path / "train" / "layer=*" / "heads-*.parquet").collect()
    assert heads["importance"].list.len().to_list() == heads["cache_size"].to_list()
    assert len(heads) == 4 * HEADS


def test_one_row_group_per_example(tmp_path: Path) -> None:
    write(tmp_path)
    file = pq.ParquetFile(tiny_file(tmp_path))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [60, 99, 27]


def test_an_example_without_any_token_is_one_still(tmp_path: Path) -> None:
    cache = random_cache(SHAPE, 9, 0)
    with ShardWriter(tmp_path, "train", 0, SHAPE) as writer:
        for example in range(2):
            info = ExampleInfo(example, example, f"s{example}", 9)
            writer.examples.append(info)
            for layer in range(2):
                rows = choose_tokens(*(states[layer] for states in cache), None, torch.Generator(), "s", layer)
                known = ("kv_head", "position", "importance", "probability", "keys", "values")
                nothing = {name: getattr(rows, name)[:0] for name in known}
                writer.write_layer(layer, info, rows if example else dataclasses.replace(rows, **nothing))
    write_manifest(tmp_path, SHAPE, {"train": 1})
    reader = ExampleReader(tmp_path, "train", 0)
    assert reader.read(0).keys.shape == (HEADS, 0, 4)
    assert torch.equal(reader.read(1).keys, cache[0].flatten(0, 1).half())


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / name, tokens=6)
    for file in sorted((tmp_path / "first").rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "second" / file.relative_to(tmp_path / "first")).read_bytes()


def test_a_reader_of_some_layers_and_sequences_is_a_part_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path, tokens=6)
    whole = ExampleReader(tmp_path, "train", cache_bytes=0)
    part = ExampleReader(tmp_path, "train", cache_bytes=0, layers=[1], sequences=[1])
    assert [info.example for info in part.examples] == [1, 2]
    assert (part.shape.layer_numbers, part.sequences) == ((1,), 1)
    for index, original in enumerate((1, 2)):
        ours, theirs = part.read(index), whole.read(original)
        width = ours.keys.shape[1]  # that of the layer's own fullest head
        assert torch.equal(ours.keys, theirs.keys[3:, :width])
        assert torch.equal(ours.count, theirs.count[3:, :width])
        assert not theirs.count[3:, width:].any()
        assert torch.equal(ours.best_cost, theirs.best_cost[3:])


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(PipelineError, match=r"the traces have layers 0, 1, not 2; name others\."):
        ExampleReader(tmp_path, "train", 0, layers=[0, 2])


def test_memory_is_bounded(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ExampleReader(tmp_path, "train", cache_bytes=1)
    for index in range(4):
        reader.read(index)
        assert len(reader._memory) == 1


def test_concurrent_misses_count_their_bytes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    reader = ExampleReader(tmp_path, "train", cache_bytes=1 << 30)
    both = threading.Barrier(2)

    def read(index: int) -> Any:
        both.wait(timeout=60)  # both have missed before either has read
        return ExampleReader._read(reader, index)

    monkeypatch.setattr(reader, "_read", read)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(reader.read, (0, 0))
    assert first is second
    assert reader._memory_bytes == shards._bytes(first)


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_an_interrupted_shard_leaves_no_marker_and_no_files(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), ShardWriter(tmp_path, "train", 0, SHAPE):
        assert len(files(tmp_path)) == 4
        raise KeyboardInterrupt
    assert not files(tmp_path)


@pytest.mark.parametrize(("dtype", "others"), [(torch.bfloat16, "float32"), (torch.float16, "bfloat16 or float32")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_model_that_overflows_is_told_from_values_beyond_float16(dtype: torch.dtype, others: str, bad: float) -> None:
    states = torch.ones(2, 5, 4, dtype=dtype)
    assert shards.as_float16(states, "s", 3, "value").dtype == torch.float16
    states[1, 2, 3] = bad
    name = str(dtype).removeprefix("torch.")
    message = rf"^Sample s, layer 3: a value is not finite: the model overflows in {name}; .* to {others}\.$"
    with pytest.raises(PipelineError, match=message):
        shards.as_float16(states, "s", 3, "value")


def test_values_beyond_float16_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"Sample big, layer 0: a key is outside the range of float16"):
        shards.as_float16(torch.full((2, 3), 1e6), "big", 0, "key")


def test_leftovers_of_a_killed_process_are_not_published(tmp_path: Path) -> None:
    (tmp_path / "train/layer=01").mkdir(parents=True)
    killed = tmp_path / "train/layer=01/.tokens-00000.1.tmp"
    killed.write_bytes(b"half")
    (tmp_path / ".manifest.json.1.tmp").write_bytes(b"half")
    with ShardWriter(tmp_path, "train", 0, SHAPE):
        # Another process may be at work on the same shard: its file is neither written into nor taken away.
        mine = sorted(path.name for path in (tmp_path / "train/layer=01").iterdir() if path != killed)
        assert [name.split(".")[1] for name in mine] == ["heads-00000", "tokens-00000"]
        assert killed.read_bytes() == b"half"
    assert marker(tmp_path, "train", 0).is_file()
    write_manifest(tmp_path, SHAPE, {"train": 1})
    assert not list(tmp_path.rglob(".*"))


def test_a_full_disk_gives_one_sentence_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(PipelineError, match=r"No space is left on the disk while writing .*train"):
        write(tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["tokens", "heads"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str, name: str) -> None:
    write(tmp_path)
    path = tiny_file(tmp_path, name)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    reader = ExampleReader(tmp_path, "train", cache_bytes=0)
    with pytest.raises(PipelineError, match=rf"layer=01/{name}-00000\.parquet .*run the traces stage again"):
        reader.read(0)


def test_a_missing_or_broken_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"manifest\.json cannot be read"):
        ExampleReader(tmp_path, "train", 0)
    (tmp_path / "manifest.json").write_text(json.dumps({"shape": {}}))
    with pytest.raises(PipelineError, match=r"manifest\.json cannot be read"):
        ExampleReader(tmp_path, "train", 0)
