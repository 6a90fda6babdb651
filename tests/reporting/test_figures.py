from dataclasses import replace
from pathlib import Path

import matplotlib
import polars as pl
import pytest

from pipeline.reporting import figures
from pipeline.reporting.drawing import RC, Drawing, save
from pipeline.reporting.numbers import Numbers, make_numbers
from pipeline.reporting.params import ShownAs
from pipeline.reporting.plots import draw_cost_grid
from pipeline.reporting.read import read_curves, read_tables
from pipeline.reporting.run import Run
from pipeline.reporting.styles import Styles
from pipeline.tables import COST, EVALUATION
from tests.reporting.synthetic import MODEL


@pytest.fixture(scope="module")
def data(finished: tuple[Path, Run]) -> Numbers:
    root, run = finished
    curves = {path.parts[-4:-1]: path for path in sorted(root.glob("policies/*/*/*/curves.parquet"))}
    return make_numbers(
        read_tables(sorted(root.glob("scores/*/*.parquet")), EVALUATION),
        read_tables(sorted(root.glob("answers/*/*/cost.parquet")), COST),
        read_curves(curves),
        run,
    )


@pytest.fixture(scope="module")
def drawings(data: Numbers, finished: tuple[Path, Run]) -> list[Drawing]:
    return figures.drawings(data, finished[1])


def test_every_figure_is_drawn_twice_with_the_same_bytes(drawings: list[Drawing], tmp_path: Path) -> None:
    for drawing in drawings:
        first = save(drawing, tmp_path / "first").read_bytes()
        assert first.startswith(b"\x89PNG")
        assert first == save(drawing, tmp_path / "second").read_bytes(), drawing.file


def test_nothing_is_cut_off_however_few_heads_there_are(data: Numbers, finished: tuple[Path, Run]) -> None:
    _, run = finished
    few = replace(data, cost_curves=data.cost_curves.filter(layer=data.cost_curves["layer"].min()))
    for tables_of in (data, few):
        for drawing in figures.drawings(tables_of, run):
            with matplotlib.rc_context(RC):
                figure = drawing.draw()
                figure.draw_without_rendering()
                box = figure.get_tightbbox()  # inches
            width, height = figure.get_size_inches()
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01, drawing.file


def test_file_names_carry_the_numbers_of_the_paper(drawings: list[Drawing]) -> None:
    prefixes = {drawing.file.split("_")[0] for drawing in drawings}
    assert prefixes == {"fig02", "fig05a", "fig13", "fig14", "fig15", "training"}
    assert len({drawing.file for drawing in drawings}) == len(drawings)


def with_scores(data: Numbers, *shown: tuple[str, str, str]) -> Numbers:
    """Scores of (model, benchmark, metric), and nothing else."""
    model, benchmark, metric = data.scores.select("model", "benchmark", "metric").row(0)
    one = data.scores.filter(model=model, benchmark=benchmark, metric=metric)
    scores = pl.concat(
        one.with_columns(model=pl.lit(model), benchmark=pl.lit(benchmark), metric=pl.lit(metric))
        for model, benchmark, metric in shown
    )
    return replace(
        data,
        scores=scores,
        tasks=data.tasks.clear(),
        cost_curves=data.cost_curves.clear(),
        training=data.training.clear(),
    )


def with_models(run: Run, **stands_in_for: str | None) -> Run:
    """Models by name, with what each stands in for."""
    one = run.models[MODEL]
    models = {name: one.model_copy(update={"stands_in_for": other}) for name, other in stands_in_for.items()}
    matrix = run.matrix.model_copy(update={"model": tuple(models)})
    return replace(run, matrix=matrix, models=models)


@pytest.mark.parametrize(("name", "stands_in_for"), [("gemma", "Phi-4"), ("phi-4", None)])
def test_the_second_model_family_is_figure_7(
    data: Numbers, finished: tuple[Path, Run], name: str, stands_in_for: str | None
) -> None:
    _, run = finished
    shown = [("ruler", "accuracy"), ("ruler", "perplexity"), ("oasst2", "perplexity"), ("boolq", "accuracy")]
    scores = with_scores(data, *((model, *pair) for model in ("first", name) for pair in shown))
    found = figures.drawings(scores, with_models(run, **{"first": "Qwen2.5-7B-Instruct", name: stands_in_for}))
    numbers = {model: [drawing.paper for drawing in found if f"_{model}_" in drawing.file] for model in ("first", name)}
    assert numbers == {"first": ["2", "3", "10"], name: ["3", "7"]}


def test_each_benchmark_is_in_the_papers_figure_and_the_rest_in_one_more(
    data: Numbers, finished: tuple[Path, Run], tmp_path: Path
) -> None:
    _, run = finished
    shown = {
        "fig02": [("ruler", "accuracy"), ("oasst2", "perplexity")],
        "fig03": [("arc_challenge", "accuracy"), ("boolq", "accuracy")],
        "fig04": [("gov_report", "ROUGE-L")],
        "fig10": [("ruler", "perplexity")],
        "fig11": [("mmlu", "accuracy"), ("hellaswag", "normalised accuracy")],
        "more": [("longbench", "F1"), ("own", "perplexity")],
    }
    many = with_scores(data, *(("m", *pair) for pairs in shown.values() for pair in pairs))
    found = figures.drawings(many, with_models(run, m=None))
    assert [drawing.file for drawing in found] == [f"{number}_m_scores_vs_budget.png" for number in shown]
    for drawing, pairs in zip(found, shown.values(), strict=True):
        assert all(f"{run.styles.title(benchmark)} {metric}" in drawing.title for benchmark, metric in pairs)
        assert save(drawing, tmp_path).stat().st_size > 0


def test_a_legend_of_many_policies_is_not_cut_off(data: Numbers, finished: tuple[Path, Run]) -> None:
    _, run = finished
    names = [f"baseline-{letter}" for letter in "abcdefghijklmnopqr"]
    shown = {name: ShownAs(title=name) for name in run.matrix.benchmark}
    styles = Styles(run.matrix.trained_on, run.matrix.estimator, shown, dict.fromkeys(names, False), {})
    tova = data.cost_curves.filter(policy="tova", layer=0, kv_head=0, benchmark="ruler")
    curves = pl.concat(tova.with_columns(policy=pl.lit(name)) for name in names)
    with matplotlib.rc_context(RC):
        figure = draw_cost_grid(curves, [(0, 0)], 6, styles)
        figure.draw_without_rendering()
        box = figure.get_tightbbox()  # inches
    assert min(box.y0, figure.get_figheight() - box.y1) > -0.01
