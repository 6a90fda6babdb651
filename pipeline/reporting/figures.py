"""Which figures a run has, and which of the paper's each regenerates. It draws no line (``plots.py``) and no number."""

from collections.abc import Collection, Mapping

import polars as pl

from pipeline.reporting.drawing import Drawing, evenly_spaced, example_head
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.plots import draw_cost_grid, draw_head_cost, draw_scores, draw_tasks, draw_training
from pipeline.reporting.run import Run
from pipeline.reporting.styles import Styles

# A grid of more layers than this cannot be read on a page; every layer's first head is in figure 15.
GRID_LAYERS = 16
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


def drawings(numbers: Numbers, run: Run) -> list[Drawing]:
    """All figures of this run, in the paper's order."""
    found: list[Drawing] = []
    for model in run.matrix.model:
        second = (run.models[model].stands_in_for or model).lower() == SECOND_MODEL
        score_figures = SECOND_MODEL_FIGURES if second else SCORE_FIGURES
        found += _score_drawings(numbers, model, score_figures, run)
        for benchmark in run.matrix.trained_on:
            found += _cost_drawings(numbers.cost_curves, model, benchmark, run)
    if not numbers.training.is_empty():
        found.append(
            Drawing(
                "training_curves.png",
                "",
                "Validation cost during training",
                "Normalised cost on validation sequences (1 = best order), mean over heads; the band holds the "
                "middle 80% of the heads.",
                lambda: draw_training(numbers.training, run.styles),
            )
        )
    return sorted(found, key=lambda drawing: drawing.file)


def _score_drawings(
    numbers: Numbers, model: str, score_figures: Mapping[str, Collection[tuple[str, str]]], run: Run
) -> list[Drawing]:
    styles = run.styles
    scores = numbers.scores.filter(model=model)
    found = []
    for paper, shown in _score_figures(scores, score_figures):
        part = scores.join(shown, on=["benchmark", "metric"], how="semi")
        number = f"fig{int(paper):02d}" if paper else "more"
        found.append(
            Drawing(
                f"{number}_{model}_scores_vs_budget.png",
                paper,
                f"{_listed(shown, styles)} against budget, {model}",
                f"Bands are {run.report.confidence:.0%} bootstrap intervals over samples, drawn for the "
                f"{styles.estimators[0]} policies; the tables have the others. Every head keeps the same number of "
                f"tokens. Horizontal line: no eviction. {SERIES_NOTE}",
                lambda part=part: draw_scores(part, styles),  # type: ignore[misc]
            )
        )
    tasks = numbers.tasks.filter(model=model)
    for (benchmark, metric), part in tasks.group_by("benchmark", "metric", maintain_order=True):
        order = run.in_order(str(benchmark), part["task"].unique().to_list())
        found.append(
            Drawing(
                f"fig13_{model}_{benchmark}_{str(metric).replace(' ', '_')}_of_tasks.png",
                "13",
                f"Each {styles.title(str(benchmark))} task's {metric} against budget, {model}",
                "A task has few samples (table below), so single steps of these lines mean little. "
                f"Horizontal line: no eviction. {SERIES_NOTE}",
                lambda part=part, order=order: draw_tasks(part, order, styles),  # type: ignore[misc]
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


def _listed(pairs: pl.DataFrame, styles: Styles) -> str:
    return ", ".join(f"{styles.title(benchmark)} {metric}" for benchmark, metric in pairs.rows())


def _cost_drawings(cost_curves: pl.DataFrame, model: str, benchmark: str, run: Run) -> list[Drawing]:
    curves = cost_curves.filter(model=model, benchmark=benchmark)
    layers = curves["layer"].unique().sort().to_list()
    kv_heads = curves["kv_head"].unique().sort().to_list()
    if not layers:
        return []
    shown = evenly_spaced(layers, GRID_LAYERS)
    which = "every layer" if shown == layers else f"{len(shown)} of {len(layers)} layers, evenly spaced"
    heads = [(layer, kv_head) for layer in shown for kv_head in kv_heads]
    first_heads = [(layer, kv_heads[0]) for layer in layers]
    layer, kv_head = example_head(layers, kv_heads, run.report)
    one = curves.filter(layer=layer, kv_head=kv_head)
    styles = run.styles
    where = f"on {styles.title(benchmark)}, {model}"
    stem = f"{model}_{benchmark}"
    return [
        Drawing(
            f"fig05a_{stem}_cost_of_one_head.png",
            "5a",
            f"Cost per budget of layer {layer}, head {kv_head}, {where}",
            "Future attention mass of the evicted tokens over the best order's total, mean over test samples and "
            f"cache sizes; lower is better. {SERIES_NOTE}",
            lambda: draw_head_cost(one, styles),
        ),
        Drawing(
            f"fig14_{stem}_cost_grid.png",
            "14",
            f"Cost per budget by layer and head, {where}",
            f"As figure 5a, for {which} and all KV heads. {SERIES_NOTE}",
            lambda: draw_cost_grid(curves, heads, len(kv_heads) * max(1, 6 // len(kv_heads)), styles),
        ),
        Drawing(
            f"fig15_{stem}_cost_of_head_{kv_heads[0]}.png",
            "15",
            f"Cost per budget of head {kv_heads[0]} of every layer, {where}",
            f"As figure 5a, for the first KV head of each layer. {SERIES_NOTE}",
            lambda: draw_cost_grid(curves, first_heads, 6, styles),
        ),
    ]
