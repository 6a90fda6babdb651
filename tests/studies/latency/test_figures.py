"""Figure 6 shows every piece of work that was timed."""

from pathlib import Path

import polars as pl

from pipeline.reporting.drawing import save
from studies.latency.figures import LOOKS, draw_latency, latency_drawing


def test_latency_is_drawn_with_every_work(tmp_path: Path) -> None:
    rows = [
        (length, work, repeat, 1e-3 * length * (repeat + 1))
        for length in (256, 512)
        for work in LOOKS
        for repeat in (0, 1)
    ]
    table = pl.DataFrame(rows, schema=["length", "work", "repeat", "seconds"], orient="row")
    (axes,) = draw_latency(table).axes
    assert {label.get_text() for label in axes.get_legend().get_texts()} == set(LOOKS)
    assert save(latency_drawing(table, "m", "cpu"), tmp_path).name == "fig06_m_latency.png"
