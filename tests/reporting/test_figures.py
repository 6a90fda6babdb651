from dataclasses import replace
from pathlib import Path

import matplotlib
import polars as pl
import pytest

from pipeline.params import Params
from pipeline.reporting import figures, names, tables


@pytest.fixture(scope="module")
def data(finished: tuple[Path, Params]) -> figures.Tables:
    root, params = finished
    evaluation = tables.read_evaluations(root / "evaluations", params.matrix)
    return figures.Tables(
        scores=tables.score_table(evaluation, params.report),
        tasks=tables.task_table(evaluation, params.report),
        cost_curves=tables.cost_curves(tables.read_costs(root / "evaluations", params.matrix)),
        training=tables.training_table(tables.read_curves(root / "policies", params.matrix)),
    )


@pytest.fixture(scope="module")
def drawings(data: figures.Tables, finished: tuple[Path, Params]) -> list[figures.Drawing]:
    _, params = finished
    return figures.drawings(data, params)


def test_every_figure_is_drawn_twice_with_the_same_bytes(drawings: list[figures.Drawing], tmp_path: Path) -> None:
    for drawing in drawings:
        first = figures.save(drawing, tmp_path / "first").read_bytes()
        assert first.startswith(b"\x89PNG")
        assert first == figures.save(drawing, tmp_path / "second").read_bytes(), drawing.file


def test_nothing_is_cut_off_however_few_heads_there_are(data: figures.Tables, finished: tuple[Path, Params]) -> None:
    _, params = finished
    few = replace(data, cost_curves=data.cost_curves.filter(layer=data.cost_curves["layer"].min()))
    for tables_of in (data, few):
        for drawing in figures.drawings(tables_of, params):
            with matplotlib.rc_context(figures.RC):
                figure = drawing.draw()
                figure.draw_without_rendering()
                box = figure.get_tightbbox()  # inches
            width, height = figure.get_size_inches()
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01, drawing.file


def test_file_names_carry_the_numbers_of_the_paper(drawings: list[figures.Drawing]) -> None:
    prefixes = {drawing.file.split("_")[0] for drawing in drawings}
    assert prefixes == {"fig02", "fig05a", "fig13", "fig14", "fig15", "training"}
    assert len({drawing.file for drawing in drawings}) == len(drawings)


def with_scores(data: figures.Tables, *shown: tuple[str, str, str]) -> figures.Tables:
    """Scores of (model, benchmark, metric), and nothing else."""
    model, benchmark, metric = data.scores.select("model", "benchmark", "metric").row(0)
    one = data.scores.filter(model=model, benchmark=benchmark, metric=metric)
    scores = pl.concat(
        one.with_columns(model=pl.lit(model), benchmark=pl.lit(benchmark), metric=pl.lit(metric))
        for model, benchmark, metric in shown
    )
    return figures.Tables(scores, data.tasks.clear(), data.cost_curves.clear(), data.training.clear())


def with_models(params: Params, **stands_in_for: str | None) -> Params:
    """Models by name, with what each stands in for."""
    (one,) = params.models.values()
    models = {name: one.model_copy(update={"stands_in_for": other}) for name, other in stands_in_for.items()}
    matrix = params.matrix.model_copy(update={"model": tuple(models)})
    return params.model_copy(update={"matrix": matrix, "models": models})


@pytest.mark.parametrize(("name", "stands_in_for"), [("gemma", "Phi-4"), ("phi-4", None)])
def test_the_second_model_family_is_figure_7(
    data: figures.Tables, finished: tuple[Path, Params], name: str, stands_in_for: str | None
) -> None:
    _, params = finished
    shown = [("ruler", "accuracy"), ("ruler", "perplexity"), ("oasst2", "perplexity"), ("boolq", "accuracy")]
    scores = with_scores(data, *((model, *pair) for model in ("first", name) for pair in shown))
    found = figures.drawings(scores, with_models(params, **{"first": "Qwen2.5-7B-Instruct", name: stands_in_for}))
    numbers = {model: [drawing.paper for drawing in found if f"_{model}_" in drawing.file] for model in ("first", name)}
    assert numbers == {"first": ["2", "3", "10"], name: ["3", "7"]}


def test_each_benchmark_is_in_the_papers_figure_and_the_rest_in_one_more(
    data: figures.Tables, finished: tuple[Path, Params], tmp_path: Path
) -> None:
    _, params = finished
    shown = {
        "fig02": [("ruler", "accuracy"), ("oasst2", "perplexity")],
        "fig03": [("arc_challenge", "accuracy"), ("boolq", "accuracy")],
        "fig04": [("gov_report", "ROUGE-L")],
        "fig10": [("ruler", "perplexity")],
        "fig11": [("mmlu", "accuracy"), ("hellaswag", "normalised accuracy")],
        "more": [("longbench", "F1"), ("own", "perplexity")],
    }
    many = with_scores(data, *(("m", *pair) for pairs in shown.values() for pair in pairs))
    found = figures.drawings(many, with_models(params, m=None))
    assert [drawing.file for drawing in found] == [f"{number}_m_scores_vs_budget.png" for number in shown]
    for drawing, pairs in zip(found, shown.values(), strict=True):
        assert all(f"{names.corpus_title(benchmark)} {metric}" in drawing.title for benchmark, metric in pairs)
        assert figures.save(drawing, tmp_path).stat().st_size > 0


def test_latency_is_drawn_with_every_work(tmp_path: Path) -> None:
    rows = [
        (length, work, repeat, 1e-3 * length * (repeat + 1))
        for length in (256, 512)
        for work in figures.LATENCY_LOOKS
        for repeat in (0, 1)
    ]
    table = pl.DataFrame(rows, schema=["length", "work", "repeat", "seconds"], orient="row")
    (axes,) = figures.draw_latency(table).axes
    assert {label.get_text() for label in axes.get_legend().get_texts()} == set(figures.LATENCY_LOOKS)
    assert figures.save(figures.latency_drawing(table, "m", "cpu"), tmp_path).name == "fig06_m_latency.png"


def test_lines_can_be_told_apart() -> None:
    series = [(policy, None) for policy in ("full", "oracle", "lagkv", "keydiff", "knorm", "streaming-llm", "random")]
    series += [("snapkv", None), ("tova", None)]
    trained = [(policy, corpus) for policy in ("kvp-exact", "kvp-rloo") for corpus in ("ruler", "dialogues")]
    looks = [names.style(*pair) for pair in series] + [names.style(*pair) for pair in trained]
    assert len({(look.colour, look.dashes, look.width) for look in looks}) == len(looks)
    assert len({look.label for look in looks}) == len(looks)
    assert {look.label for look in looks if look.dashes == "--"} == {"SnapKV", "TOVA"}
