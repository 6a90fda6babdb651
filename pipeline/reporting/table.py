"""A table of the page and its cells, as ``table.html.jinja`` writes them. It knows no numbers."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the interval below it, and a CSS class."""

    text: str
    interval: str = ""
    look: str = ""


@dataclass(frozen=True)
class Row:
    """One row; KVP's own rows are marked."""

    cells: list[Cell]
    ours: bool = False


@dataclass(frozen=True)
class Table:
    """One table of the page."""

    title: str
    header: list[str]
    rows: list[Row]
    note: str = ""


def text_table(
    title: str, header: list[str], rows: Iterable[Sequence[str]], prose: Collection[str] = (), note: str = ""
) -> Table:
    """A table of texts without intervals; the columns named in ``prose`` are set as running text."""
    looks = ["text" if name in prose else "" for name in header]
    cells = ([Cell(text, look=look) for text, look in zip(row, looks, strict=True)] for row in rows)
    return Table(title, header, [Row(of_row) for of_row in cells], note)
