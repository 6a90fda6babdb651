"""Rows of JSON lines and Parquet, as they are published."""

import gzip
import json
import zipfile
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import PipelineError
from pipeline.samples.rows import read_rows, require_columns

# Characters that end a line for str.splitlines but not in JSON lines.
ROWS = [{"a": 1, "b": "x\u2028y\x85z"}, {"a": 2, "b": "é\n"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    pl.DataFrame(ROWS).write_parquet(tmp_path / "rows.parquet")
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("data/rows.jsonl", LINES)
    files = [tmp_path / f"rows.{suffix}" for suffix in ("jsonl", "jsonl.gz", "parquet")]
    for file in (*files, zipfile.Path(tmp_path / "rows.zip", "data/rows.jsonl")):
        assert read_rows(file) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "cannot be read as rows"),
        ("bad.jsonl", b"{", "cannot be read as rows"),
        ("latin.jsonl", b'{"a": "\xe9"}', "cannot be read as rows"),
        ("torn.jsonl.gz", gzip.compress(b"{}\n" * 1000, mtime=0)[:-20], "cannot be read as rows"),
        ("bent.jsonl.gz", gzip.compress(b"{}\n" * 1000, mtime=0)[:12] + b"\xff" * 20, "cannot be read as rows"),
        ("no.parquet", b"PAR2", "cannot be read as rows"),
        ("list.jsonl", b"[1]\n", "every line must be a JSON object"),
    ],
)
def test_unreadable_files_are_one_sentence(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PipelineError, match=message) as caught:
        read_rows(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    require_columns(ROWS, ["a", "b"], tmp_path, "the schema")
    with pytest.raises(PipelineError, match="some rows lack b, c; the source must follow the schema"):
        require_columns([*ROWS, {"a": 3}], ["a", "b", "c"], tmp_path, "the schema")
