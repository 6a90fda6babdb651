"""Figure 5b, the figure of the axes and that of the lengths, from the tables of ``tables.py``."""

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from pipeline.reporting.drawing import Drawing
from studies.sensitivity.columns import BASE, NO_POSITION
from studies.sensitivity.tables import NOT_LONGER, OWN, SAME_BENCHMARK, titled

# Axis of the study -> title of its panel; the numeric ones double from value to value.
AXES = {
    "training_fraction": "Share of the training sequences",
    "steps": "Training steps",
    "hidden_width": "Hidden width of the agents",
    "inputs": "What the agents see (hollow: no position)",
}
# Value of the axis of inputs -> words for it.
INPUTS = {"keys": "keys", "values": "values", "both": "keys and values", "hidden": "hidden states"}
NUMERIC = ("training_fraction", "steps", "hidden_width")
# Okabe and Ito's, which are told apart with any colour vision; taken in turn.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "h", "s", "D", "^", "v", "P")
RATE_LOOKS = (("-", "o"), ("--", "^"), (":", "v"), ("-.", "s"))
COST_LABEL = "normalised cost on validation"


def drawings(
    summary: pl.DataFrame, curves: pl.DataFrame, confidence: float, titles: Mapping[str, str]
) -> list[Drawing]:
    """The figures of each model of the study; ``titles`` are those of the benchmarks."""
    summary, curves = titled(summary, titles), titled(curves, titles)
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
                "for the last panels it is evaluated on the same. Every panel changes one thing of the base variant.",
                lambda ends=ends: draw_axes(ends),  # type: ignore[misc]
            ),
        ]
        far = ends.filter(SAME_BENCHMARK, ~OWN)
        if not far.is_empty():
            found.append(
                Drawing(
                    f"sensitivity_{model}_lengths.png",
                    "",
                    f"Transfer to longer sequences by what the agents see, {model}",
                    f"Normalised cost at the end of training: {bands}. Left: on validation sequences as long as those "
                    "of the training; right: the same policies on longer ones of the same tasks. Costs of the two "
                    "panels are divided by different best orders: compare within a panel.",
                    lambda ends=ends: draw_lengths(ends),  # type: ignore[misc]
                )
            )
    return found


def estimator_words(name: str) -> str:
    """What a reader sees for an estimator."""
    return name.replace("_", " ")


def draw_estimators(curves: pl.DataFrame) -> Figure:
    """Cost against training step for each estimator, one panel for each benchmark (figure 5b)."""
    benchmarks = curves["trained_on"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(6.2 * len(benchmarks), 5.2), layout="constrained")
    for axes, benchmark in zip(figure.subplots(1, len(benchmarks), squeeze=False)[0], benchmarks, strict=True):
        part = curves.filter(pl.col("trained_on") == benchmark)
        values = part["value"].unique(maintain_order=True).to_list()
        estimators = list(dict.fromkeys(value.partition(" ")[0] for value in values))
        rates = list(dict.fromkeys(value.partition(" ")[2] for value in values))  # the base's, without a name, first
        for value in values:
            estimator, _, rate = value.partition(" ")
            label, colour = estimator_words(estimator), COLOURS[estimators.index(estimator) % len(COLOURS)]
            dashes, marker = RATE_LOOKS[rates.index(rate) % len(RATE_LOOKS)]
            if rate:
                label += f", learning rate {rate}"
            line = part.filter(pl.col("value") == value).sort("step")
            step, mean, low, high = (line[column].to_numpy() for column in ("step", "mean", "low", "high"))
            axes.plot(step, mean, color=colour, linestyle=dashes, marker=marker, markersize=4, label=label)
            axes.fill_between(step, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(benchmark)
        axes.set_xlabel("training step")
        axes.set_ylabel(COST_LABEL)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 20]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize=9)
    return figure


def draw_axes(summary: pl.DataFrame) -> Figure:
    """Final cost against each axis of the study, and of the base variant on other benchmarks and longer sequences."""
    own = summary.filter(OWN)
    shown = [axis for axis in AXES if axis in own["axis"]]
    base = summary.filter(pl.col("axis") == BASE[0], pl.col("value") == BASE[1])
    lengths = _with_longer(base)
    columns = 3
    rows = -(-(len(shown) + 1 + (not lengths.is_empty())) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    unused = iter(panels)
    for axis in shown:
        axes, part = next(unused), own.filter(pl.col("axis") == axis)
        if axis == "inputs":
            _inputs(axes, part)
        else:
            _points(axes, part, part["value"].unique(maintain_order=True).to_list(), "value", joined=axis in NUMERIC)
        axes.set_title(AXES[axis])
    axes, part = next(unused), base.filter(NOT_LONGER)
    _points(axes, part, part["benchmark"].unique(maintain_order=True).to_list(), "benchmark", joined=False)
    axes.set_title("Evaluated on")
    if not lengths.is_empty():
        axes = next(unused)
        _points(axes, lengths, lengths["length"].unique().sort().to_list(), "length", joined=False)
        trained = " / ".join(f"{length:,}" for length in lengths["trained_length"].unique().sort())
        axes.set_title(f"Length: trained at {trained} tokens, evaluated at", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    for axes in unused:
        axes.set_visible(False)
    return figure


def draw_lengths(summary: pl.DataFrame) -> Figure:
    """Final cost by inputs, one row for each benchmark with longer sequences and one column for each length."""
    part = _with_longer(summary.filter(pl.col("axis") == "inputs"))
    benchmarks = part["benchmark"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(11, 3.9 * len(benchmarks)), layout="constrained")
    for row, benchmark in zip(figure.subplots(len(benchmarks), 2, squeeze=False), benchmarks, strict=True):
        of_benchmark = part.filter(pl.col("benchmark") == benchmark)
        for axes, length in zip(row, of_benchmark["length"].unique().sort().to_list(), strict=True):
            _inputs(axes, of_benchmark.filter(pl.col("length") == length))
            trained = of_benchmark["trained_length"][0]
            axes.set_title(f"{benchmark}: trained at {trained:,} tokens, evaluated at {length:,}", fontsize=11)
            axes.legend(fontsize=9)
    return figure


def _with_longer(summary: pl.DataFrame) -> pl.DataFrame:
    """The rows about the benchmark trained on, at both lengths, of the trainings that have longer sequences."""
    return summary.filter(SAME_BENCHMARK).filter((~OWN).any().over("trained_on"))


def _inputs(axes: Axes, part: pl.DataFrame) -> None:
    """The axis of inputs: a place for each, a filled mark with position features and a hollow one without."""
    part = part.with_columns(hollow=pl.col("value").str.ends_with(NO_POSITION))
    part = part.with_columns(pl.col("value").str.strip_suffix(NO_POSITION))
    places = part["value"].unique(maintain_order=True).to_list()
    for hollow in (False, True):
        _points(axes, part.filter(pl.col("hollow") == hollow), places, "value", joined=False, hollow=hollow)
    axes.set_xticks(range(len(places)), ["\n".join(INPUTS[place].rsplit(" ", 1)) for place in places], fontsize=9)


def _points(
    axes: Axes, part: pl.DataFrame, values: Sequence[str | int], column: str, joined: bool, hollow: bool = False
) -> None:
    trained = part["trained_on"].unique(maintain_order=True).to_list()
    for place, benchmark in enumerate(trained):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        rows = {row[column]: row for row in part.filter(pl.col("trained_on") == benchmark).iter_rows(named=True)}
        # Side by side, so that none hides another.
        shift = 0.14 * (place - (len(trained) - 1) / 2) + (0.06 if hollow else 0)
        x = [position + shift for position, value in enumerate(values) if value in rows]
        found = [rows[value] for value in values if value in rows]
        mean = [row["mean"] for row in found]
        axes.errorbar(
            x,
            mean,
            yerr=[[row["mean"] - row["low"] for row in found], [row["high"] - row["mean"] for row in found]],
            color=colour,
            marker=marker,
            markersize=5,
            linestyle="-" if joined else "none",
            capsize=3,
            markerfacecolor="white" if hollow else colour,
            label=f"trained on {benchmark}" + (NO_POSITION if hollow else ""),
        )
    labels = [f"{value:,}" if isinstance(value, int) else value for value in values]
    axes.set_xticks(range(len(values)), labels, fontsize=9)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_ylabel(COST_LABEL, fontsize=10)
