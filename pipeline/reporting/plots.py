"""The figures of lines, from the tables of ``aggregate.py``. It computes no number that a table lacks.

It knows neither the paper's figures nor files.
"""

from collections.abc import Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from pipeline.reporting.aggregate import LOWER_IS_BETTER, PERPLEXITY, select, series
from pipeline.reporting.drawing import grid, line
from pipeline.reporting.styles import Style, Styles


def draw_scores(scores: pl.DataFrame, styles: Styles) -> Figure:
    """Each benchmark's metric against the budget, one panel for each (figure 2)."""
    panels = scores.select("benchmark", "metric").unique().sort("metric", "benchmark").rows()
    looks = _looks(scores, styles)
    figure, places = grid(len(panels), columns=3, panel=(6.2, 5.0), sharex=False, sharey=False, looks=looks)
    for axes, (benchmark, metric) in zip(places, panels, strict=True):
        part = scores.filter(benchmark=benchmark, metric=metric)
        _score_axes(axes, part, styles, bands=True)
        axes.set_title(f"{styles.title(benchmark)}: {metric}")
        axes.set_ylabel(metric + (" (lower is better)" if metric in LOWER_IS_BETTER else ""))
        axes.set_xlabel("budget (tokens kept per head)")
    return figure


def draw_tasks(tasks: pl.DataFrame, order: Sequence[str], styles: Styles) -> Figure:
    """Accuracy against budget for each task of one benchmark (figure 13)."""
    figure, places = grid(len(order), columns=5, panel=(3.1, 2.6), sharey=True, looks=_looks(tasks, styles))
    for axes, task in zip(places, order, strict=True):
        _score_axes(axes, tasks.filter(pl.col("task") == task), styles, bands=False)
        axes.set_title(task, fontsize=11)
        axes.tick_params(labelsize=9)
    figure.supxlabel("budget (tokens kept per head)")
    figure.supylabel(str(tasks["metric"][0]))
    return figure


def draw_head_cost(curves: pl.DataFrame, styles: Styles) -> Figure:
    """Cost at each budget for one head (figure 5a)."""
    figure, (axes,) = grid(1, columns=1, panel=(6.8, 4.8), sharey=False, looks=_looks(curves, styles))
    _cost_axes(axes, curves, styles, thin=False)
    axes.set_xlabel("budget / cache size")
    axes.set_ylabel("importance of evicted tokens\n(share of the best order's total over all budgets)")
    return figure


def draw_cost_grid(curves: pl.DataFrame, heads: Sequence[tuple[int, int]], columns: int, styles: Styles) -> Figure:
    """Cost at each budget, one panel for each (layer, kv_head) (figures 14 and 15)."""
    figure, places = grid(len(heads), columns=columns, panel=(2.3, 1.75), sharey=True, looks=_looks(curves, styles))
    for axes, (layer, kv_head) in zip(places, heads, strict=True):
        part = curves.filter(layer=layer, kv_head=kv_head)
        _cost_axes(axes, part, styles, thin=True)
        axes.set_title(f"layer {layer}, head {kv_head}", fontsize=10, pad=3)
        axes.tick_params(labelsize=8.5)
    figure.supxlabel("budget / cache size")
    figure.supylabel("importance of evicted tokens\n(share of the best order's total)")
    return figure


def draw_training(training: pl.DataFrame, styles: Styles) -> Figure:
    """Validation cost against step, all estimators, one panel for each model and benchmark."""
    validation = training.filter(pl.col("metric") == "validation_cost")
    panels = validation.select("model", "trained_on").unique(maintain_order=True).rows()
    figure, places = grid(len(panels), columns=2, panel=(5.4, 4.2), sharey=False)
    for axes, (model, trained_on) in zip(places, panels, strict=True):
        for estimator in styles.estimators:
            look = styles.style(f"kvp-{estimator}", trained_on)
            part = validation.filter(model=model, trained_on=trained_on, estimator=estimator).sort("step")
            if part.is_empty():
                continue
            step = part["step"].to_numpy() + 1  # updates made
            axes.plot(step, part["mean"].to_numpy(), color=look.colour, linewidth=look.width, label=look.label)
            axes.fill_between(
                step, part["q10"].to_numpy(), part["q90"].to_numpy(), color=look.colour, alpha=0.1, linewidth=0
            )
        axes.axhline(1, color="#000000", linestyle=":", linewidth=1.5, label="Best order")
        axes.set_title(f"{model}, {styles.title(trained_on)}")
        axes.set_xlabel("training step")
        axes.set_ylabel("normalised cost on validation")
        # From the first ranking to the last the cost falls tenfold; the end would be a flat line.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 5, 10, 20]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend()
    return figure


def _score_axes(axes: Axes, part: pl.DataFrame, styles: Styles, bands: bool) -> None:
    budgets = part["budget"].drop_nulls().unique().sort().to_list()
    for policy, trained_on in reversed(series(part, styles)):
        look = styles.style(policy, trained_on)
        rows = select(part, policy, trained_on).sort("budget")
        mean, low, high = (rows[column].to_numpy() for column in ("mean", "low", "high"))
        order = _above(look)
        if rows["budget"].null_count():
            axes.axhline(mean[0], color=look.colour, linewidth=look.width, zorder=order)
            continue
        x = rows["budget"].to_numpy()
        axes.plot(x, mean, zorder=order, **line(look))
        if bands and policy == styles.reference:
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
    elif part["metric"][0] != PERPLEXITY:
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


def _looks(frame: pl.DataFrame, styles: Styles) -> list[Style]:
    return [styles.style(*pair) for pair in series(frame, styles)]


def _above(look: Style) -> int:
    """Height of a line: the first of the legend lies on top, all above bands and axes."""
    return 1000 - look.order


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _cost_axes(axes: Axes, part: pl.DataFrame, styles: Styles, thin: bool) -> None:
    for policy, trained_on in reversed(series(part, styles)):
        look = styles.style(policy, trained_on)
        rows = select(part, policy, trained_on).sort("fraction")
        keywords = line(look)
        if thin:
            keywords |= {"linewidth": 0.6 * look.width, "marker": ""}
        axes.plot(rows["fraction"].to_numpy(), rows["cost"].to_numpy(), zorder=_above(look), **keywords)
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
