"""The paper's figures from the tables of ``tables.py``. It computes no number that a table lacks.

Figures are drawn without pyplot: no global state, no display. Equal tables give equal bytes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from PIL import Image

from pipeline.params import Params, ReportParams
from pipeline.reporting import names, tables
from pipeline.workdir import atomic_write

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
# Inches that the legend of all policies takes.
LEGEND_HEIGHT = 4.4
# A grid of more layers than this cannot be read on a page; every layer's first head is in figure 15.
GRID_LAYERS = 16
LATENCY_LOOKS = {
    "prefill": ("#444444", "s"),
    "decode step": ("#999999", "D"),
    "ranking, all layers": ("#0072B2", "o"),
    "ranking, one layer": ("#56B4E9", "^"),
}
SERIES_NOTE = "Dashed: attention-based policies, which see the question. Dotted: the order by true future importance."


# Figures of the paper that show scores; what no figure shows is drawn in one more.
TRAINED_ON = (("ruler", "accuracy"), ("dialogues", "perplexity"), ("oasst2", "perplexity"), ("oasst1", "perplexity"))
RULER_PERPLEXITY = ("ruler", "perplexity")
ZERO_SHOT_FIGURES = {
    "3": (("boolq", "accuracy"), ("arc_challenge", "accuracy")),
    "4": (("gov_report", "ROUGE-L"),),
    "11": (("mmlu", "accuracy"), ("hellaswag", "normalised accuracy")),
}
SCORE_FIGURES = {"2": TRAINED_ON, "10": (RULER_PERPLEXITY,), **ZERO_SHOT_FIGURES}
# The paper's second model family, and what shows it in place of figures 2 and 10.
SECOND_MODEL = "phi-4"
SECOND_MODEL_FIGURES = {"7": (*TRAINED_ON, RULER_PERPLEXITY), **ZERO_SHOT_FIGURES}


@dataclass(frozen=True)
class Drawing:
    """One figure: what to call it, which of the paper's it regenerates, and how to draw it."""

    file: str
    paper: str
    title: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Tables:
    """What the figures are drawn from (``tables.py`` describes the columns)."""

    scores: pl.DataFrame
    tasks: pl.DataFrame
    cost_curves: pl.DataFrame
    training: pl.DataFrame


def drawings(data: Tables, params: Params) -> list[Drawing]:
    """All figures of this run, in the paper's order."""
    found: list[Drawing] = []
    for model in params.matrix.model:
        second = (params.models[model].stands_in_for or model).lower() == SECOND_MODEL
        score_figures = SECOND_MODEL_FIGURES if second else SCORE_FIGURES
        found += _score_drawings(data, model, score_figures, f"{params.report.confidence:.0%}")
        for corpus in params.matrix.corpus:
            found += _cost_drawings(data.cost_curves, model, corpus, params.report)
    if not data.training.is_empty():
        found.append(
            Drawing(
                "training_curves.png",
                "",
                "Validation cost during training",
                "Normalised cost on validation sequences (1 = best order), mean over heads; the band holds the "
                "middle 80% of the heads.",
                lambda: draw_training(data.training),
            )
        )
    return sorted(found, key=lambda drawing: drawing.file)


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


def example_head(layers: Sequence[int], kv_heads: Sequence[int], report: ReportParams) -> tuple[int, int]:
    """The (layer, kv_head) that figures of one head show; one near the middle where a model lacks the chosen one."""
    layer = report.example_layer if report.example_layer in layers else layers[len(layers) // 2]
    return layer, report.example_kv_head if report.example_kv_head in kv_heads else kv_heads[0]


def evenly_spaced(values: list[int], count: int) -> list[int]:
    """At most ``count`` >= 2 of ``values``, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def latency_drawing(latency: pl.DataFrame, model: str, device: str) -> Drawing:
    """Figure 6 from the table of ``pipeline/evaluation/latency.py``."""
    return Drawing(
        f"fig06_{model}_latency.png",
        "6",
        f"Time of a ranking beside the model's own work, {model} on {device}",
        "Medians of repeated calls on one machine; the bars reach from the fastest to the slowest.",
        lambda: draw_latency(latency),
    )


def draw_latency(latency: pl.DataFrame) -> Figure:
    """Seconds of each piece of work against context length (figure 6)."""
    figure = _figure(8.4, 5.2)
    axes = figure.subplots()
    seconds = pl.col("seconds")
    summary = latency.group_by("work", "length").agg(seconds.median(), low=seconds.min(), high=seconds.max())
    for (work,), part in summary.sort("length").group_by("work", maintain_order=True):
        colour, marker = LATENCY_LOOKS[str(work)]
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


def draw_scores(scores: pl.DataFrame) -> Figure:
    """Each benchmark's metric against the budget, one panel for each (figure 2)."""
    panels = scores.select("benchmark", "metric").unique().sort("metric", "benchmark").rows()
    figure, grid = _grid(len(panels), columns=3, panel=(6.2, 5.0), sharex=False, sharey=False)
    for axes, (benchmark, metric) in zip(grid, panels, strict=True):
        part = scores.filter(pl.col("benchmark") == benchmark, pl.col("metric") == metric)
        _score_axes(axes, part, bands=True)
        axes.set_title(f"{names.corpus_title(benchmark)}: {metric}")
        axes.set_ylabel(metric + (" (lower is better)" if metric in names.LOWER_IS_BETTER else ""))
        axes.set_xlabel("budget (tokens kept per head)")
    _legend(figure, tables.series(scores))
    return figure


def draw_tasks(tasks: pl.DataFrame) -> Figure:
    """Accuracy against budget for each task of one benchmark (figure 13)."""
    panels = sorted(tasks["task"].unique().to_list(), key=names.task_order)
    figure, grid = _grid(len(panels), columns=5, panel=(3.1, 2.6), sharey=True)
    for axes, task in zip(grid, panels, strict=False):
        _score_axes(axes, tasks.filter(pl.col("task") == task), bands=False)
        axes.set_title(task, fontsize=11)
        axes.tick_params(labelsize=9)
    figure.supxlabel("budget (tokens kept per head)")
    figure.supylabel(str(tasks["metric"][0]))
    _legend(figure, tables.series(tasks))
    return figure


def draw_head_cost(curves: pl.DataFrame) -> Figure:
    """Cost at each budget for one head (figure 5a)."""
    figure = _figure(9.2, 5.4)
    axes = figure.subplots()
    _cost_axes(axes, curves, thin=False)
    axes.set_xlabel("budget / cache size")
    axes.set_ylabel("importance of evicted tokens\n(share of the best order's total over all budgets)")
    _legend(figure, tables.series(curves))
    return figure


def draw_cost_grid(curves: pl.DataFrame, heads: Sequence[tuple[int, int]], columns: int) -> Figure:
    """Cost at each budget, one panel for each (layer, kv_head) (figures 14 and 15)."""
    figure, grid = _grid(len(heads), columns=columns, panel=(2.3, 1.75), sharey=True)
    for axes, (layer, kv_head) in zip(grid, heads, strict=False):
        part = curves.filter(pl.col("layer") == layer, pl.col("kv_head") == kv_head)
        _cost_axes(axes, part, thin=True)
        axes.set_title(f"layer {layer}, head {kv_head}", fontsize=10, pad=3)
        axes.tick_params(labelsize=8.5)
    figure.supxlabel("budget / cache size")
    figure.supylabel("importance of evicted tokens\n(share of the best order's total)")
    _legend(figure, tables.series(curves))
    return figure


def draw_training(training: pl.DataFrame) -> Figure:
    """Validation cost against step, exact against rloo, one panel for each model and corpus."""
    validation = training.filter(pl.col("metric") == "validation_cost")
    panels = validation.select("model", "corpus").unique(maintain_order=True).rows()
    figure, grid = _grid(len(panels), columns=2, panel=(5.4, 4.2), sharey=False)
    for axes, (model, corpus) in zip(grid, panels, strict=False):
        for estimator in ("exact", "rloo"):
            look = names.style(f"kvp-{estimator}", corpus)
            part = validation.filter(
                pl.col("model") == model, pl.col("corpus") == corpus, pl.col("estimator") == estimator
            ).sort("step")
            if part.is_empty():
                continue
            step = part["step"].to_numpy() + 1  # updates made
            axes.plot(step, part["mean"].to_numpy(), color=look.colour, linewidth=look.width, label=look.label)
            axes.fill_between(
                step, part["q10"].to_numpy(), part["q90"].to_numpy(), color=look.colour, alpha=0.1, linewidth=0
            )
        axes.axhline(1, color="#000000", linestyle=":", linewidth=1.5, label="Best order")
        axes.set_title(f"{model}, {names.corpus_title(corpus)}")
        axes.set_xlabel("training step")
        axes.set_ylabel("normalised cost on validation")
        # From the first ranking to the last the cost falls tenfold; the end would be a flat line.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 5, 10, 20]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend()
    return figure


def _score_drawings(
    data: Tables, model: str, score_figures: Mapping[str, Collection[tuple[str, str]]], percent: str
) -> list[Drawing]:
    scores = data.scores.filter(pl.col("model") == model)
    found = []
    for paper, shown in _score_figures(scores, score_figures):
        part = scores.join(shown, on=["benchmark", "metric"], how="semi")
        number = f"fig{int(paper):02d}" if paper else "more"
        found.append(
            Drawing(
                f"{number}_{model}_scores_vs_budget.png",
                paper,
                f"{_listed(shown)} against budget, {model}",
                f"Bands are {percent} bootstrap intervals over samples, drawn for the exact policies; the tables have "
                "the others. Every head keeps the same number of tokens. "
                f"Horizontal line: no eviction. {SERIES_NOTE}",
                lambda part=part: draw_scores(part),  # type: ignore[misc]
            )
        )
    tasks = data.tasks.filter(pl.col("model") == model)
    for (benchmark, metric), part in tasks.group_by("benchmark", "metric", maintain_order=True):
        found.append(
            Drawing(
                f"fig13_{model}_{benchmark}_{str(metric).replace(' ', '_')}_of_tasks.png",
                "13",
                f"Each {names.corpus_title(str(benchmark))} task's {metric} against budget, {model}",
                "A task has few samples (table below), so single steps of these lines mean little. "
                f"Horizontal line: no eviction. {SERIES_NOTE}",
                lambda part=part: draw_tasks(part),  # type: ignore[misc]
            )
        )
    return found


def _score_figures(
    scores: pl.DataFrame, score_figures: Mapping[str, Collection[tuple[str, str]]]
) -> list[tuple[str, pl.DataFrame]]:
    """The paper's number of each figure of scores, with the (benchmark, metric) pairs it shows."""
    there = scores.select("benchmark", "metric").unique().sort("metric", "benchmark")
    wanted = [
        (paper, there.filter(pl.struct("benchmark", "metric").is_in([{"benchmark": b, "metric": m} for b, m in pairs])))
        for paper, pairs in score_figures.items()
    ]
    rest = there.join(pl.concat([pairs for _, pairs in wanted]), on=["benchmark", "metric"], how="anti")
    return [
        (paper, pairs) for paper, pairs in [*wanted, ("", rest.sort("metric", "benchmark"))] if not pairs.is_empty()
    ]


def _listed(pairs: pl.DataFrame) -> str:
    return ", ".join(f"{names.corpus_title(benchmark)} {metric}" for benchmark, metric in pairs.rows())


def _cost_drawings(cost_curves: pl.DataFrame, model: str, corpus: str, report: ReportParams) -> list[Drawing]:
    curves = cost_curves.filter(pl.col("model") == model, pl.col("corpus") == corpus)
    layers = curves["layer"].unique().sort().to_list()
    kv_heads = curves["kv_head"].unique().sort().to_list()
    if not layers:
        return []
    shown = evenly_spaced(layers, GRID_LAYERS)
    which = "every layer" if shown == layers else f"{len(shown)} of {len(layers)} layers, evenly spaced"
    heads = [(layer, kv_head) for layer in shown for kv_head in kv_heads]
    first_heads = [(layer, kv_heads[0]) for layer in layers]
    layer, kv_head = example_head(layers, kv_heads, report)
    one = curves.filter(pl.col("layer") == layer, pl.col("kv_head") == kv_head)
    where = f"on {names.corpus_title(corpus)}, {model}"
    stem = f"{model}_{corpus}"
    return [
        Drawing(
            f"fig05a_{stem}_cost_of_one_head.png",
            "5a",
            f"Cost per budget of layer {layer}, head {kv_head}, {where}",
            "Future attention mass of the evicted tokens over the best order's total, mean over test samples and "
            f"cache sizes; lower is better. {SERIES_NOTE}",
            lambda: draw_head_cost(one),
        ),
        Drawing(
            f"fig14_{stem}_cost_grid.png",
            "14",
            f"Cost per budget by layer and head, {where}",
            f"As figure 5a, for {which} and all KV heads. {SERIES_NOTE}",
            lambda: draw_cost_grid(curves, heads, len(kv_heads) * max(1, 6 // len(kv_heads))),
        ),
        Drawing(
            f"fig15_{stem}_cost_of_head_{kv_heads[0]}.png",
            "15",
            f"Cost per budget of head {kv_heads[0]} of every layer, {where}",
            f"As figure 5a, for the first KV head of each layer. {SERIES_NOTE}",
            lambda: draw_cost_grid(curves, first_heads, 6),
        ),
    ]


def _score_axes(axes: Axes, part: pl.DataFrame, bands: bool) -> None:
    budgets = part["budget"].drop_nulls().unique().sort().to_list()
    for policy, trained_on in reversed(tables.series(part)):
        look = names.style(policy, trained_on)
        line = tables.select(part, policy, trained_on).sort("budget")
        mean, low, high = (line[column].to_numpy() for column in ("mean", "low", "high"))
        order = 30 - look.order
        if line["budget"].null_count():
            axes.axhline(mean[0], color=look.colour, linewidth=look.width, zorder=order)
            continue
        x = line["budget"].to_numpy()
        axes.plot(x, mean, zorder=order, **_line(look))
        if bands and look.kind == "kvp" and look.width > 2:
            # A band per line would hide them all; the tables have every interval.
            axes.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0, zorder=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    _log_scale_if_wide(axes, part)


def _log_scale_if_wide(axes: Axes, part: pl.DataFrame) -> None:
    # A policy that destroys the cache has a perplexity that would flatten every other line.
    low, high = part.select(pl.col("mean").min(), pl.col("mean").max().alias("high")).row(0)
    if part["metric"][0] == "accuracy":
        axes.set_ylim(-0.03, 1.03)
    elif part["metric"][0] != "perplexity":
        axes.set_ylim(0, None)
    elif low > 0 and high / low > 3:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        if high / low < 12:
            axes.yaxis.set_minor_formatter(FuncFormatter(_plain))
        else:
            # Nine labels a decade would run into each other.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _cost_axes(axes: Axes, part: pl.DataFrame, thin: bool) -> None:
    for policy, trained_on in reversed(tables.series(part)):
        look = names.style(policy, trained_on)
        line = tables.select(part, policy, trained_on).sort("fraction")
        keywords = _line(look)
        if thin:
            keywords |= {"linewidth": 0.6 * look.width, "marker": ""}
        axes.plot(line["fraction"].to_numpy(), line["cost"].to_numpy(), zorder=30 - look.order, **keywords)
    axes.set_yscale("log")
    if thin:
        # Minor ticks of dozens of panels take most of the drawing time and say nothing at this size.
        axes.yaxis.set_minor_locator(NullLocator())
    # Below a thousandth of the largest cost nothing is left to lose, and the decades would hide the rest.
    top = float(part["cost"].max() or 1)  # type: ignore[arg-type]
    axes.set_ylim(max(1e-3 * top, 0.5 * float(part["cost"].min() or 0)), 1.5 * top)  # type: ignore[arg-type]
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1] if thin else [0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))


def _line(look: names.Style) -> dict[str, Any]:
    return {
        "color": look.colour,
        "linestyle": look.dashes,
        "linewidth": look.width,
        "marker": look.marker,
        "markersize": 6 if look.width > 2 else 4.5,
    }


def _legend(figure: Figure, series: Sequence[tuple[str, str | None]]) -> None:
    looks = [names.style(*pair) for pair in series]
    handles = [Line2D([], [], label=look.label, **_line(look)) for look in looks]
    figure.legend(handles=handles, loc="outside right upper", handlelength=3.2, labelspacing=0.7)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _grid(
    count: int, columns: int, panel: tuple[float, float], sharey: bool, sharex: bool = True
) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = _figure(panel[0] * columns + 2.4, max(LEGEND_HEIGHT, panel[1] * rows + 0.6))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for place, unused in enumerate(axes[count:], start=count):
        unused.set_visible(False)
        # The panel above an empty place ends its column: it needs the tick labels.
        axes[place - columns].tick_params(labelbottom=True)
    return figure, axes[:count]
