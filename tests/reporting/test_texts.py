"""Coloured texts: how they are laid out, what the figures show, and what the page carries."""

import base64
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from pipeline.errors import PipelineError
from pipeline.reporting.colours import EVICTED_INK, KEPT_INK, STEPS, backgrounds, ramps
from pipeline.reporting.drawing import save
from pipeline.reporting.page import TEMPLATES
from pipeline.reporting.run import Run
from pipeline.reporting.text_figures import draw_panels, drawings, wrap
from pipeline.reporting.texts import Text, page_block, read_texts
from tests.reporting.synthetic import MODEL, SKILL

BUDGET = 30


def read(root: Path, run: Run) -> list[Text]:
    pairs = [(MODEL, benchmark) for benchmark in run.matrix.trained_on]
    tables = {pair: root.joinpath("texts", *pair, "tokens.parquet") for pair in pairs}
    samples = {pair: root.joinpath("samples", *pair, "test.parquet") for pair in pairs}
    return read_texts(tables, samples, run.styles)


@pytest.fixture(scope="module")
def run(finished: tuple[Path, Run]) -> Run:
    return replace(finished[1], budgets=(BUDGET,))


@pytest.fixture(scope="module")
def texts(finished: tuple[Path, Run]) -> list[Text]:
    return read(*finished)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_texts_are_read_in_the_order_of_the_matrix(texts: list[Text], finished: tuple[Path, Run]) -> None:
    root, _ = finished
    assert [(text.benchmark, text.task) for text in texts] == [
        ("ruler", "niah_multikey_1"), ("ruler", "vt"), ("dialogues", "dialogues"),
    ]  # fmt: skip
    text = texts[0]
    assert set(text.ranks) == set(SKILL)
    table = pl.read_parquet(root / "texts" / MODEL / "ruler/tokens.parquet")
    rows = table.filter(sample_id=text.sample_id, policy="kvp-exact", trained_on="ruler", layer=2, kv_head=1)
    for position, importance, rank in rows.select("position", "importance", "rank").iter_rows():
        assert text.importance[2, 1, position] == np.float32(importance)
        assert text.ranks["kvp-exact", "ruler"][2, 1, position] == rank


def test_a_table_that_lacks_a_head_is_one_sentence(run_directory: Path, finished: tuple[Path, Run]) -> None:
    path = run_directory / "texts" / MODEL / "ruler/tokens.parquet"
    table = pl.read_parquet(path)
    dropped = (pl.col("policy") == "tova") & (pl.col("layer") == 1) & (pl.col("kv_head") == 0)
    table.filter(~dropped).write_parquet(path)
    with pytest.raises(PipelineError, match=r"tokens\.parquet lacks tokens, heads or policies; run the texts stage"):
        read(run_directory, finished[1])


def test_the_answer_is_found_across_tokens_and_windows_hold_it(texts: list[Text]) -> None:
    text = texts[0]
    answer = text.answer_tokens()
    assert "".join(text.tokens[i] for i in answer) == " 7391"  # the tokens that "7391" has letters in
    assert set(answer) <= set(text.window(20))
    assert len(text.window(20)) == 20
    assert text.window(10_000) == range(len(text.tokens))
    without = texts[2]
    assert len(without.answer_tokens()) == 0
    assert without.window(20) == range(len(without.tokens) - 20, len(without.tokens))


@pytest.mark.parametrize("columns", [1, 5, 9, 40])
def test_wrapping_keeps_every_character_and_fits(columns: int) -> None:
    words = ["One", " of", " the", " magic", " numb", "ers", ":", "\n", "\n", " 7", "3", "9.", "\n", "incomprehensibly"]
    lines = wrap(words, columns)
    assert max(map(len, lines)) <= columns
    flat = [cell for line in lines for cell in line]
    assert "".join(letter for letter, _ in flat).replace("↵", "\n") == "".join(words)
    for index, word in enumerate(words):
        assert "".join(letter for letter, own in flat if own == index).replace("↵", "\n") == word
    if columns == 40:
        read = ["".join(letter for letter, _ in line) for line in lines]
        assert read == ["One of the magic numbers:↵", "↵", " 739.↵", "incomprehensibly"]
    if columns == 9:  # words stay whole, whatever their tokens
        assert " numbers:" in ["".join(letter for letter, _ in line) for line in lines]


def test_a_character_that_the_font_lacks_is_shown_as_a_box() -> None:
    ((first, second, third),) = wrap(["é", "語", "x"], 10)
    assert (first[0], second[0], third[0]) == ("é", "▯", "x")


def test_colours_darken_with_rank_and_can_be_read() -> None:
    n, budget = 300, 80
    colours = backgrounds(np.arange(n, dtype=np.int32), n, budget)
    light = np.array([luminance(colour) for colour in colours])
    assert (np.diff(light) > -1e-4).all()  # kept longest is darkest, in print too
    assert light[budget] - light[budget - 1] > 0.15  # the budget can be seen
    for place, colour in enumerate(colours):
        ink = KEPT_INK if place < budget else EVICTED_INK
        high, low = sorted((luminance(colour), luminance(ink)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, place  # WCAG 2, level AA
    for ramp in ramps():
        assert len(set(ramp)) == STEPS
    assert len(backgrounds(np.arange(60, dtype=np.int32), 60, 60)) == 60  # a budget that evicts nothing


def test_figures_1_8_9_and_12_are_drawn_twice_with_the_same_bytes(texts: list[Text], run: Run, tmp_path: Path) -> None:
    found = drawings(texts, run)
    assert [drawing.file.split("_")[0] for drawing in found] == ["fig01", "fig08", "fig09", "fig12"]
    for drawing in found:
        first = save(drawing, tmp_path / "first").read_bytes()
        assert first.startswith(b"\x89PNG")
        assert first == save(drawing, tmp_path / "second").read_bytes(), drawing.file


def test_without_an_answer_or_a_second_text_there_is_one_figure_less(texts: list[Text], run: Run) -> None:
    assert [drawing.paper for drawing in drawings(texts[2:], run)] == ["8"]
    assert [drawing.paper for drawing in drawings(texts[:1], run)] == ["1", "8"]


def test_a_panel_shows_the_ranks_of_its_policy_and_head(texts: list[Text], run: Run) -> None:
    text, pair = texts[0], ("snapkv", None)
    drawn = draw_panels(text, 2, 1, BUDGET, range(len(text.tokens)), [pair], run.styles, columns=1, advance=8)
    (panel,) = (axes for axes in drawn.axes if axes.collections)
    fills = panel.collections[0].get_facecolors()
    ranks = text.ranks[pair][2, 1]
    # One box per token and line; the tokens of this text are short, so a box per token.
    darkness = [1 - float(fill[:3].mean()) for fill in np.asarray(fills)]
    boxes: Sequence[float] = darkness[: len(ranks)]
    assert spearmanr(ranks, boxes).statistic < -0.98
    kept = sum(len(text.tokens[i].replace(" ", "")) for i in np.flatnonzero(ranks < BUDGET))
    shown = "".join(t.get_text() for t in panel.texts if t.get_color() == KEPT_INK).replace(" ", "")
    assert len(shown) == kept
    importance = text.importance[2, 1]
    share = importance[ranks < BUDGET].sum() / importance.sum()
    notes = [t.get_text() for t in drawn.texts]
    last = max(ranks[i] for i in text.answer_tokens())
    assert f"keeps {share:.0%}; all of the answer from {last + 1} tokens" in notes


def test_the_page_carries_ranks_and_importance_of_the_layers_it_offers(
    texts: list[Text], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = page_block(texts, run)
    assert [one["layers"] for one in whole["texts"]] == [list(range(9))] * 3
    monkeypatch.setattr("pipeline.reporting.texts.PAGE_BYTES", 1)
    block = json.loads(json.dumps(page_block(texts, run)))
    for one, text in zip(block["texts"], texts, strict=True):
        assert one["layers"] == [0, 2, 4, 6, 8]  # the first and the last, and those of the figures
        shape = (len(text.ranks), len(one["layers"]), 2, len(text.tokens))
        ranks = np.frombuffer(base64.b64decode(one["ranks"]), np.uint8).reshape(shape)
        halves = np.frombuffer(base64.b64decode(one["importance"]), "<u2").reshape(shape[1:])
        importance = (halves.astype("<u4") << 16).view("<f4")
        np.testing.assert_allclose(importance, text.importance[one["layers"]], rtol=2**-7)
        for place, pair in enumerate(text.ranks):
            found = ranks[place] / 255 * (shape[-1] - 1)
            assert np.abs(found - text.ranks[pair][one["layers"]]).max() <= (shape[-1] - 1) / 255 / 2 + 1e-6
        assert one["policies"][0] == {"id": "oracle", "label": "Oracle"}
        assert {"id": "kvp-exact@dialogues", "label": "KVP_S exact"} in one["policies"]
        assert (one["layer"], one["kv_head"]) == (4, 1)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_valid(tmp_path: Path) -> None:
    source = (TEMPLATES / "texts.html.jinja").read_text()
    (script,) = (part.partition("</script>")[0] for part in source.split("<script>")[1:])
    file = tmp_path / "script.js"
    file.write_text(script)
    subprocess.run(["node", "--check", str(file)], check=True, capture_output=True)
