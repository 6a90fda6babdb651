from pathlib import Path

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
    return figures.drawings(data, params.matrix, params.report)


def test_every_figure_is_drawn_twice_with_the_same_bytes(drawings: list[figures.Drawing], tmp_path: Path) -> None:
    for drawing in drawings:
        first = figures.save(drawing, tmp_path / "first").read_bytes()
        assert first.startswith(b"\x89PNG")
        assert first == figures.save(drawing, tmp_path / "second").read_bytes(), drawing.file


def test_file_names_carry_the_numbers_of_the_paper(drawings: list[figures.Drawing]) -> None:
    prefixes = {drawing.file.split("_")[0] for drawing in drawings}
    assert prefixes == {"fig02", "fig05a", "fig13", "fig14", "fig15", "training"}
    assert len({drawing.file for drawing in drawings}) == len(drawings)


def test_a_second_model_is_figure_7(data: figures.Tables, finished: tuple[Path, Params]) -> None:
    _, params = finished
    matrix = params.matrix.model_copy(update={"model": ("first", "second")})
    empty = figures.Tables(data.scores.clear(), data.tasks.clear(), data.cost_curves.clear(), data.training.clear())
    files = [drawing.file for drawing in figures.drawings(empty, matrix, params.report)]
    assert files == ["fig02_first_scores_vs_budget.png", "fig07_second_scores_vs_budget.png"]


def test_lines_can_be_told_apart() -> None:
    series = [(policy, None) for policy in ("full", "oracle", "lagkv", "keydiff", "knorm", "streaming-llm", "random")]
    series += [("snapkv", None), ("tova", None)]
    trained = [(policy, corpus) for policy in ("kvp-exact", "kvp-rloo") for corpus in ("ruler", "dialogues")]
    looks = [names.style(*pair) for pair in series] + [names.style(*pair) for pair in trained]
    assert len({(look.colour, look.dashes, look.width) for look in looks}) == len(looks)
    assert len({look.label for look in looks}) == len(looks)
    assert {look.label for look in looks if look.dashes == "--"} == {"SnapKV", "TOVA"}
