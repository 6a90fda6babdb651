"""Tables in parts, so that an interrupted stage continues with the first that is not there. It knows no columns."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipeline.files import atomic_write


def write_part(path: Path, table: pl.DataFrame) -> None:
    """Write one sample's rows, atomically; existing parts are what an interrupted sweep continues from."""
    with atomic_write(path) as temporary:
        table.write_parquet(temporary, compression="zstd")


def merge_parts(parts: Sequence[Path], out: Path) -> None:
    """Concatenate parts, in the order given, into one table."""
    write_part(out, pl.concat([pl.read_parquet(part) for part in parts]))
