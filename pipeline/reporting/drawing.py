"""What a figure is, how it is saved, and the parts that figures share. It knows neither tables nor policies.

Figures are drawn without pyplot: no global state, no display. Equal tables give equal bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from pipeline.files import atomic_write, remove
from pipeline.reporting.params import ReportParams
from pipeline.reporting.styles import Style

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.hashsalt": "kvp",
}
DPI = 110
# Inches that the legend of the default profile's policies takes, and what each line of a longer one does.
LEGEND_HEIGHT, LEGEND_LINE = 4.4, 0.3


@dataclass(frozen=True)
class Drawing:
    """One figure: what to call it, which of the paper's it regenerates, and how to draw it."""

    file: str
    paper: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def save(drawing: Drawing, directory: Path) -> Path:
    """Draw a figure as PNG, without version or date so that equal figures have equal bytes; returns its path.

    Each carries a palette of 256 colours, which makes it three times smaller.
    """
    path = directory / drawing.file
    drawn = BytesIO()
    with matplotlib.rc_context(RC), atomic_write(path) as temporary:
        drawing.draw().savefig(drawn, format="png", dpi=DPI)
        image = Image.open(drawn).convert("RGB")
        image.quantize(256, dither=Image.Dither.NONE).save(temporary, format="png", optimize=True)
    return path


def save_all(drawings: Sequence[Drawing], directory: Path) -> list[tuple[Drawing, Path]]:
    """:func:`save` figures, and nothing else, in a directory; in the order of their files, each with its path."""
    remove(directory)
    return [(drawing, save(drawing, directory)) for drawing in sorted(drawings, key=lambda drawing: drawing.file)]


def example_head(layers: Sequence[int], kv_heads: Sequence[int], report: ReportParams) -> tuple[int, int]:
    """The (layer, kv_head) that figures of one head show; one near the middle where a model lacks the chosen one."""
    layer = report.example_layer if report.example_layer in layers else layers[len(layers) // 2]
    return layer, report.example_kv_head if report.example_kv_head in kv_heads else kv_heads[0]


def evenly_spaced(values: list[int], count: int) -> list[int]:
    """At most ``count`` >= 2 of ``values``, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def grid(
    count: int,
    columns: int,
    panel: tuple[float, float],
    sharey: bool,
    sharex: bool = True,
    looks: Sequence[Style] = (),
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, each of a size in inches, with the names of policies at its right."""
    columns = min(columns, count)
    rows = -(-count // columns)
    height = max(LEGEND_HEIGHT, LEGEND_LINE * (len(looks) + 1), panel[1] * rows + 0.6)
    figure = Figure(figsize=(panel[0] * columns + 2.4, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for place, unused in enumerate(axes[count:], start=count):
        unused.set_visible(False)
        # The panel above an empty place ends its column: it needs the tick labels.
        axes[place - columns].tick_params(labelbottom=True)
    if looks:
        handles = [Line2D([], [], label=look.label, **line(look)) for look in looks]
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2, labelspacing=0.7)
    return figure, axes[:count]


def line(look: Style) -> dict[str, Any]:
    """How matplotlib draws a policy's line."""
    return {
        "color": look.colour,
        "linestyle": look.dashes,
        "linewidth": look.width,
        "marker": look.marker,
        "markersize": 6 if look.width > 2 else 4.5,
    }
