"""The commands train and report, from traces to the page."""

import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from ruamel.yaml import YAML

from pipeline.params import Params, load_params
from pipeline.profiles import render
from studies.sensitivity import figures, page, tables
from studies.sensitivity.columns import STUDY_COLUMNS
from studies.sensitivity.params import titles
from studies.sensitivity.report import report
from studies.sensitivity.train import train
from tests.studies.sensitivity.conftest import ESTIMATORS, STUDY, TRAIN, write_all

REPOSITORY = Path(__file__).parents[3]
RESULTS, REPORTS = "studies/results/sensitivity.parquet", "studies/reports/sensitivity"
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces and params in which both commands have run."""
    root = tmp_path_factory.mktemp("run")
    content = YAML(typ="safe").load(render("ci", REPOSITORY / "profiles").params)
    content["train"] = TRAIN.model_dump(mode="json")
    content["estimators"] = {name: estimator.model_dump(mode="json") for name, estimator in ESTIMATORS.items()}
    (root / "studies").mkdir()
    for path, part in (
        ("params.yaml", content),
        ("studies/params.yaml", {"sensitivity": STUDY.model_dump(mode="json")}),
    ):
        with (root / path).open("w") as stream:
            YAML(typ="safe").dump(part, stream)
    write_all(root / "traces" / MODEL, root / "studies/traces" / MODEL, MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("OMP_NUM_THREADS", "1")
        train("cpu", 0.1)
        report()
    return root


@pytest.fixture
def data(finished: Path) -> tuple[Params, pl.DataFrame, pl.DataFrame]:
    study = pl.read_parquet(finished / RESULTS)
    params = load_params(finished / "params.yaml")
    return params, tables.summary_table(study, 0.95), tables.curve_table(study, 0.95)


def test_the_stages_write_the_table_figures_and_page(finished: Path) -> None:
    table = pl.read_parquet(finished / RESULTS)
    assert tuple(table.columns) == STUDY_COLUMNS
    assert set(table["model"]) == {MODEL}
    written = sorted(path.name for path in (finished / REPORTS).iterdir())
    figures = [f"fig05b_{MODEL}_estimators.png", f"sensitivity_{MODEL}.png", f"sensitivity_{MODEL}_lengths.png"]
    assert written == sorted([*figures, "index.html"])


def test_the_page_stands_alone_and_shows_the_numbers(
    finished: Path, data: tuple[Params, pl.DataFrame, pl.DataFrame]
) -> None:
    text = (finished / REPORTS / "index.html").read_text()
    assert text.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "<script" not in text
    assert "td.better" in text  # the style of the main report
    for words in ("the paper's figure 5b", "inputs: hidden states, no position", "t-interval over 2 seeds"):
        assert words in text
    _, summary, _ = data
    for value, name in (("rloo", "ruler"), ("soft_rank 0.1", "dialogues")):
        row = summary.filter(axis="estimator", value=value, trained_on=name, benchmark=name, length=512).row(
            0, named=True
        )
        table = text[text.index(f"{'RULER' if name == 'ruler' else 'Doc2Dial dialogues'}: normalised cost") :]
        cells = table.partition(f"<td>estimator: {value}</td>")[2].partition("</tr>")[0]
        assert f"{row['mean']:.3f}<small>{row['low']:.3f} to {row['high']:.3f}" in cells
        assert f"{row['difference']:+.3f}" in cells


def test_the_page_shows_both_lengths(finished: Path, data: tuple[Params, pl.DataFrame, pl.DataFrame]) -> None:
    text = (finished / REPORTS / "index.html").read_text()
    table = text[text.index("Transfer between lengths: RULER, trained at 512 tokens") :].partition("</table>")[0]
    assert "cost at 1,024" in table
    for value, words in (("both", "keys and values"), ("hidden, no position", "hidden states, no position")):
        cells = table.partition(f"<td>inputs: {words}</td>")[2].partition("</tr>")[0]
        for length in (512, 1024):
            row = data[1].filter(axis="inputs", value=value, trained_on="ruler", benchmark="ruler", length=length)
            assert f"{row['mean'][0]:.3f}<small>{row['low'][0]:.3f} to {row['high'][0]:.3f}" in cells
    # Longer sequences must not get into what is about the length that was trained on.
    assert "cost at 512" in table
    assert text.count("Transfer between benchmarks") == 1


def test_a_study_without_longer_sequences_and_hidden_states_needs_no_more(
    finished: Path, data: tuple[Params, pl.DataFrame, pl.DataFrame]
) -> None:
    params, summary, curves = data
    plain = summary.filter(tables.NOT_LONGER, ~pl.col("value").str.starts_with("hidden"))
    files = [drawing.file for drawing in figures.drawings(plain, curves, 0.95, titles(params))]
    assert files == [f"fig05b_{MODEL}_estimators.png", f"sensitivity_{MODEL}.png"]
    figure = figures.draw_axes(plain)
    assert not [axes for axes in figure.axes if axes.get_visible() and "Length" in axes.get_title()]
    assert "Transfer between lengths" not in page.render(params, STUDY, plain, [])


def test_a_value_better_than_the_base_is_marked_so(data: tuple[Params, pl.DataFrame, pl.DataFrame]) -> None:
    params, summary, _ = data
    made_up = summary.with_columns(
        difference=pl.when(pl.col("value") == "rloo").then(-0.2).otherwise(0.0),
        difference_low=pl.when(pl.col("value") == "rloo").then(-0.3).otherwise(-0.1),
        difference_high=pl.when(pl.col("value") == "rloo").then(-0.1).otherwise(0.1),
    )
    text = page.render(params, STUDY, made_up, [])
    assert text.count('class="better"') == 2  # rloo on either benchmark
    assert 'class="worse"' not in text


def test_figures_are_drawn_twice_with_the_same_bytes(
    finished: Path, data: tuple[Params, pl.DataFrame, pl.DataFrame], tmp_path: Path
) -> None:
    from pipeline.reporting.drawing import save

    params, summary, curves = data
    for drawing in figures.drawings(summary, curves, 0.95, titles(params)):
        drawn = save(drawing, tmp_path).read_bytes()
        assert drawn == (finished / REPORTS / drawing.file).read_bytes()


def test_a_second_run_trains_nothing_and_writes_the_same_bytes(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr("studies.sensitivity.study.train_policy", None)
    train("cpu", 0.1)
    assert Path(RESULTS).read_bytes() == (finished / RESULTS).read_bytes()
