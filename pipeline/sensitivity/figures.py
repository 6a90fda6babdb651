"""Figure 5b and the figure of the axes, from the tables of ``tables.py``."""

from collections.abc import Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from pipeline.reporting import names
from pipeline.reporting.figures import Drawing
from pipeline.sensitivity.variants import BASE

# Axis of the study -> title of its panel; the numeric ones double from value to value.
AXES = {
    "training_fraction": "Share of the training sequences",
    "steps": "Training steps",
    "hidden_width": "Hidden width of the agents",
    "inputs": "What the agents see",
}
NUMERIC = ("training_fraction", "steps", "hidden_width")
# Okabe and Ito's, as in reporting/names.py.
ESTIMATORS = {"exact": ("exact", "#0072B2"), "rloo": ("rloo", "#D55E00"), "softrank": ("soft rank", "#009E73")}
RATE_LOOKS = (("-", "o"), ("--", "^"), (":", "v"), ("-.", "s"))
COST_LABEL = "normalised cost on validation"


def drawings(summary: pl.DataFrame, curves: pl.DataFrame, confidence: float) -> list[Drawing]:
    """The figures of each model of the study."""
    found = []
    bands = f"mean over heads and seeds with the {confidence:.0%} t-interval over seeds"
    for model in summary["model"].unique(maintain_order=True).to_list():
        of_model = curves.filter(pl.col("model") == model)
        ends = summary.filter(pl.col("model") == model)
        found += [
            Drawing(
                f"fig05b_{model}_estimators.png",
                "5b",
                f"Policy gradients against a differentiable-sorting surrogate, {model}",
                f"Normalised cost on validation sequences (1 = best order) during training: {bands}. The surrogate "
                "regresses soft ranks onto the ranks by importance. Solid lines have the learning rate of the base "
                "variant, others the rate in the legend.",
                lambda of_model=of_model: draw_estimators(of_model),  # type: ignore[misc]
            ),
            Drawing(
                f"sensitivity_{model}.png",
                "",
                f"What the held-out cost depends on, {model}",
                f"Normalised cost at the end of training: {bands}. Colours say what the policy was trained on; but "
                "for the last panel it is evaluated on the same. Every panel changes one thing of the base variant.",
                lambda ends=ends: draw_axes(ends),  # type: ignore[misc]
            ),
        ]
    return found


def draw_estimators(curves: pl.DataFrame) -> Figure:
    """Cost against training step for each estimator, one panel for each corpus (figure 5b)."""
    corpora = curves["trained_on"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(6.2 * len(corpora), 5.2), layout="constrained")
    for axes, corpus in zip(figure.subplots(1, len(corpora), squeeze=False)[0], corpora, strict=True):
        part = curves.filter(pl.col("trained_on") == corpus)
        values = part["value"].unique(maintain_order=True).to_list()
        rates = list(dict.fromkeys(value.partition(" ")[2] for value in values))  # the base's, without a name, first
        for value in values:
            estimator, _, rate = value.partition(" ")
            label, colour = ESTIMATORS[estimator]
            dashes, marker = RATE_LOOKS[rates.index(rate) % len(RATE_LOOKS)]
            if rate:
                label += f", learning rate {rate}"
            line = part.filter(pl.col("value") == value).sort("step")
            step, mean, low, high = (line[column].to_numpy() for column in ("step", "mean", "low", "high"))
            axes.plot(step, mean, color=colour, linestyle=dashes, marker=marker, markersize=4, label=label)
            axes.fill_between(step, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(names.corpus_title(corpus))
        axes.set_xlabel("training step")
        axes.set_ylabel(COST_LABEL)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 20]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize=9)
    return figure


def draw_axes(summary: pl.DataFrame) -> Figure:
    """Final cost against each axis of the study, and of the base variant on the other corpora."""
    shown = [axis for axis in AXES if axis in summary["axis"]]
    own = summary.filter(pl.col("trained_on") == pl.col("corpus"))
    columns = 3
    rows = -(-(len(shown) + 1) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, axis in zip(panels, shown, strict=False):
        part = own.filter(pl.col("axis") == axis)
        _points(axes, part, part["value"].unique(maintain_order=True).to_list(), "value", joined=axis in NUMERIC)
        axes.set_title(AXES[axis])
    transfer = panels[len(shown)]
    base = summary.filter(pl.col("axis") == BASE[0], pl.col("value") == BASE[1])
    _points(transfer, base, base["corpus"].unique(maintain_order=True).to_list(), "corpus", joined=False)
    transfer.set_title("Evaluated on")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    for unused in panels[len(shown) + 1 :]:
        unused.set_visible(False)
    return figure


def _points(axes: Axes, part: pl.DataFrame, values: Sequence[str], column: str, joined: bool) -> None:
    corpora = part["trained_on"].unique(maintain_order=True).to_list()
    for place, corpus in enumerate(corpora):
        look = names.style("kvp-exact", corpus)
        rows = {row[column]: row for row in part.filter(pl.col("trained_on") == corpus).iter_rows(named=True)}
        # Side by side, so that one corpus does not hide another.
        x = [
            position + 0.12 * (place - (len(corpora) - 1) / 2) for position, value in enumerate(values) if value in rows
        ]
        found = [rows[value] for value in values if value in rows]
        mean = [row["mean"] for row in found]
        axes.errorbar(
            x,
            mean,
            yerr=[[row["mean"] - row["low"] for row in found], [row["high"] - row["mean"] for row in found]],
            color=look.colour,
            marker=look.marker,
            markersize=5,
            linestyle="-" if joined else "none",
            capsize=3,
            label=f"trained on {names.corpus_title(corpus)}",
        )
    labels = [names.corpus_title(value).replace(", ", "\n") for value in values]
    axes.set_xticks(range(len(values)), labels, fontsize=9)
    axes.set_ylabel(COST_LABEL, fontsize=10)
