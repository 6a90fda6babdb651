"""Values found in a file are those that Arrow decodes; where they do not lie as in memory, nothing is found."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.traces.pages import plain_values


def locate(path: Path, rows: list[list[float | None]], size: int | None = None, **options: Any) -> int | None:
    """Write half-precision lists, and look for ``size`` bytes of values (all, by default)."""
    table = pa.table({"filler": pa.array([0] * len(rows)), "rows": pa.array(rows, pa.list_(pa.float16()))})
    pq.write_table(table, path, **{"compression": "none", "use_dictionary": False, "write_statistics": False} | options)
    chunk = pq.read_metadata(path).row_group(0).column(1)
    with path.open("rb") as file:
        return plain_values(file, chunk, 2 * sum(map(len, rows)) if size is None else size)


@pytest.mark.parametrize("count", [1, 63, 64, 5000, 300_000])
@pytest.mark.parametrize("ragged", [False, True])
def test_plain_values_are_found(count: int, ragged: bool, tmp_path: Path) -> None:
    # Ragged: some lists are empty, and have a level but no value.
    lengths = [index % 4 if ragged else 4 for index in range(count)]
    rows = [[float(index % 1000 + 1)] * length for index, length in enumerate(lengths)]
    options = {"data_page_size": 1 << 30, "max_rows_per_page": 1 << 30}
    offset = locate(tmp_path / "file", rows, **options)
    assert offset is not None
    expected = np.concatenate([np.asarray(row, np.float16) for row in rows])
    found = np.frombuffer((tmp_path / "file").read_bytes(), np.float16, sum(lengths), offset)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"column_encoding": {"rows.list.element": "BYTE_STREAM_SPLIT"}},
        {"data_page_version": "2.0"},
        {"data_page_size": 256, "write_batch_size": 16},
        {"max_rows_per_page": 100},
        {"write_page_checksum": True},
    ],
)
def test_other_encodings_are_left_to_arrow(options: dict[str, Any], tmp_path: Path) -> None:
    rows: list[list[float | None]] = [[1.0, 2.0]] * 1000
    assert locate(tmp_path / "file", rows) is not None
    assert locate(tmp_path / "file", rows, **options) is None


def test_nulls_and_other_sizes_are_left_to_arrow(tmp_path: Path) -> None:
    assert locate(tmp_path / "file", [[1.0, None], [3.0, 4.0]]) is None
    for size in (6, 10):
        assert locate(tmp_path / "file", [[1.0, 2.0], [3.0, 4.0]], size) is None
