"""Rows of a published data set: JSON lines or Parquet, told apart by the file's name. It knows no data set."""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")


def read_rows(file: Path | zipfile.Path) -> list[Row]:
    """All rows of a ``.parquet``, ``.jsonl`` or ``.jsonl.gz`` file, which may lie inside a zip archive.

    Raises
    ------
    PipelineError
        The file cannot be read, or a line is no JSON object.
    """
    try:
        if isinstance(file, Path) and file.suffix == ".parquet":
            rows: list[Row] = pq.read_table(file).to_pylist()
            return rows
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    except (OSError, EOFError, ValueError, pa.ArrowInvalid, zipfile.BadZipFile, zlib.error) as error:
        raise PipelineError(
            f"{file} cannot be read as rows ({error}); give .jsonl, .jsonl.gz or .parquet, as it was published."
        ) from None
    if not all(isinstance(row, dict) for row in rows):
        raise PipelineError(f"{file}: every line must be a JSON object.")
    return rows


def require_columns(rows: Iterable[Row], columns: Iterable[str], source: Path, schema: str) -> None:
    """Refuse rows that lack a column; ``schema`` names what they should follow."""
    missing = [column for column in columns if not all(column in row for row in rows)]
    if missing:
        raise PipelineError(f"{source}: some rows lack {', '.join(missing)}; the source must follow {schema}.")
