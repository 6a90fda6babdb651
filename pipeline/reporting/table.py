"""A table of the page and its cells, as ``table.html.jinja`` writes them. It knows no numbers."""

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
