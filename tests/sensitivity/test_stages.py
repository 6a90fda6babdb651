"""The stages sensitivity and sensitivity_report, from traces to the page."""

import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from ruamel.yaml import YAML

from pipeline.params import Params, load_params
from pipeline.sensitivity import figures, page, tables
from pipeline.sensitivity.study import STUDY_COLUMNS
from stages.sensitivity import main
from stages.sensitivity_report import report
from tests.sensitivity.conftest import STUDY, TRAIN, write_all

REPOSITORY = Path(__file__).parents[2]
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces and params in which both stages have run."""
    root = tmp_path_factory.mktemp("run")
    content = YAML(typ="safe").load((REPOSITORY / "profiles/ci.yaml").read_text())
    content |= {"train": TRAIN.model_dump(mode="json"), "sensitivity": STUDY.model_dump(mode="json")}
    with (root / "params.yaml").open("w") as stream:
        YAML(typ="safe").dump(content, stream)
    write_all(root / "traces" / MODEL, root / "study_traces" / MODEL, MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("OMP_NUM_THREADS", "1")
        main("cpu", 0.1)
        report(Path("results/sensitivity.parquet"), Path("params.yaml"))
    return root


@pytest.fixture
def data(finished: Path) -> tuple[Params, pl.DataFrame, pl.DataFrame]:
    study = pl.read_parquet(finished / "results/sensitivity.parquet")
    params = load_params(finished / "params.yaml")
    return params, tables.summary_table(study, 0.95), tables.curve_table(study, 0.95)


def test_the_stages_write_the_table_figures_and_page(finished: Path) -> None:
    table = pl.read_parquet(finished / "results/sensitivity.parquet")
    assert tuple(table.columns) == STUDY_COLUMNS
    assert set(table["model"]) == {MODEL}
    written = sorted(path.name for path in (finished / "reports/sensitivity").iterdir())
    figures = [f"fig05b_{MODEL}_estimators.png", f"sensitivity_{MODEL}.png", f"sensitivity_{MODEL}_lengths.png"]
    assert written == sorted([*figures, "index.html"])


def test_the_page_stands_alone_and_shows_the_numbers(
    finished: Path, data: tuple[Params, pl.DataFrame, pl.DataFrame]
) -> None:
    text = (finished / "reports/sensitivity/index.html").read_text()
    assert text.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "<script" not in text
    assert "td.better" in text  # the style of the main report
    for words in ("the paper's figure 5b", "inputs: hidden states, no position", "t-interval over 2 seeds"):
        assert words in text
    _, summary, _ = data
    for value, corpus in (("rloo", "ruler"), ("softrank 0.1", "dialogues")):
        row = summary.filter(axis="estimator", value=value, trained_on=corpus, corpus=corpus, length=512).row(
            0, named=True
        )
        table = text[text.index(f"{'RULER' if corpus == 'ruler' else 'Doc2Dial dialogues'}: normalised cost") :]
        cells = table.partition(f"<td>estimator: {value}</td>")[2].partition("</tr>")[0]
        assert f"{row['mean']:.3f}<small>{row['low']:.3f} to {row['high']:.3f}" in cells
        assert f"{row['difference']:+.3f}" in cells


def test_the_page_shows_both_lengths(finished: Path, data: tuple[Params, pl.DataFrame, pl.DataFrame]) -> None:
    text = (finished / "reports/sensitivity/index.html").read_text()
    table = text[text.index("Transfer between lengths: RULER, trained at 512 tokens") :].partition("</table>")[0]
    assert "cost at 1,024" in table
    for value, words in (("both", "keys and values"), ("hidden, no position", "hidden states, no position")):
        cells = table.partition(f"<td>inputs: {words}</td>")[2].partition("</tr>")[0]
        for length in (512, 1024):
            row = data[1].filter(axis="inputs", value=value, trained_on="ruler", corpus="ruler", length=length)
            assert f"{row['mean'][0]:.3f}<small>{row['low'][0]:.3f} to {row['high'][0]:.3f}" in cells
    # Longer sequences must not get into what is about the length that was trained on.
    assert "cost at 512" in table
    assert text.count("Transfer between corpora") == 1


def test_a_study_without_longer_sequences_and_hidden_states_needs_no_more(
    finished: Path, data: tuple[Params, pl.DataFrame, pl.DataFrame]
) -> None:
    params, summary, curves = data
    plain = summary.filter(tables.NOT_LONGER, ~pl.col("value").str.starts_with("hidden"))
    files = [drawing.file for drawing in figures.drawings(plain, curves, 0.95)]
    assert files == [f"fig05b_{MODEL}_estimators.png", f"sensitivity_{MODEL}.png"]
    figure = figures.draw_axes(plain)
    assert not [axes for axes in figure.axes if axes.get_visible() and "Length" in axes.get_title()]
    assert "Transfer between lengths" not in page.render(params, plain, [])


def test_a_value_better_than_the_base_is_marked_so(data: tuple[Params, pl.DataFrame, pl.DataFrame]) -> None:
    params, summary, _ = data
    made_up = summary.with_columns(
        difference=pl.when(pl.col("value") == "rloo").then(-0.2).otherwise(0.0),
        difference_low=pl.when(pl.col("value") == "rloo").then(-0.3).otherwise(-0.1),
        difference_high=pl.when(pl.col("value") == "rloo").then(-0.1).otherwise(0.1),
    )
    text = page.render(params, made_up, [])
    assert text.count('class="better"') == 2  # rloo on either corpus
    assert 'class="worse"' not in text


def test_figures_are_drawn_twice_with_the_same_bytes(
    finished: Path, data: tuple[Params, pl.DataFrame, pl.DataFrame], tmp_path: Path
) -> None:
    from pipeline.reporting.figures import save

    _, summary, curves = data
    for drawing in figures.drawings(summary, curves, 0.95):
        drawn = save(drawing, tmp_path).read_bytes()
        assert drawn == (finished / "reports/sensitivity" / drawing.file).read_bytes()


def test_a_second_run_trains_nothing_and_writes_the_same_bytes(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr("pipeline.sensitivity.study.train_policy", None)
    main("cpu", 0.1)
    assert Path("results/sensitivity.parquet").read_bytes() == (finished / "results/sensitivity.parquet").read_bytes()
