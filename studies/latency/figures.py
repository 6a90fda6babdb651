"""Figure 6, from the table of ``measure.py``."""

import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pipeline.reporting.drawing import Drawing

LOOKS = {
    "prefill": ("#444444", "s"),
    "decode step": ("#999999", "D"),
    "ranking, all layers": ("#0072B2", "o"),
    "ranking, one layer": ("#56B4E9", "^"),
}


def latency_drawing(latency: pl.DataFrame, model: str, device: str) -> Drawing:
    """Figure 6 from the table of :func:`studies.latency.measure.measure_latency`."""
    return Drawing(
        f"fig06_{model}_latency.png",
        "6",
        f"Time of a ranking beside the model's own work, {model} on {device}",
        "Medians of repeated calls on one machine; the bars reach from the fastest to the slowest.",
        lambda: draw_latency(latency),
    )


def draw_latency(latency: pl.DataFrame) -> Figure:
    """Seconds of each piece of work against context length."""
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    seconds = pl.col("seconds")
    summary = latency.group_by("work", "length").agg(seconds.median(), low=seconds.min(), high=seconds.max())
    for (work,), part in summary.sort("length").group_by("work", maintain_order=True):
        colour, marker = LOOKS[str(work)]
        middle = part["seconds"].to_numpy()
        reach = [middle - part["low"].to_numpy(), part["high"].to_numpy() - middle]
        axes.errorbar(
            part["length"].to_numpy(), middle, yerr=reach, color=colour, marker=marker, capsize=3, label=str(work)
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = latency["length"].unique().sort().to_list()
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("seconds")
    axes.legend()
    return figure
