"""Texts whose tokens are coloured by their place in a policy's order: figures 1, 8, 9, 12 and a block of the page.

It ranks nothing: ``pipeline/evaluation/examples.py`` made the table that this file draws.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from pipeline.errors import PipelineError
from pipeline.params import MatrixParams, ReportParams
from pipeline.reporting import names, tables
from pipeline.reporting.figures import DPI, Drawing, evenly_spaced, example_head

TOKEN_COLUMNS = (
    "sample_id", "task", "policy", "trained_on", "layer", "kv_head", "position", "token", "importance", "rank",
)  # fmt: skip
Pair = tuple[str, str | None]

# A perceptually uniform map that reads with any colour vision and in grey. Kept tokens take its dark part and evicted
# ones its light part, with a step in between; on each of the two parts one ink can be read.
COLOUR_MAP = "magma_r"
KEPT_PART, EVICTED_PART, STEPS = (0.85, 0.5), (0.22, 0.0), 12
KEPT_INK, EVICTED_INK = "#ffffff", "#404040"
LEVELS = 256  # of the ranks on the page

# Tokens of figure 1, of a whole-text figure, and of a text on the page; longer texts are cut to a window.
EXCERPT, WHOLE, PAGE = 72, 1_200, 5_000
# Bytes of ranks that the page may carry, before base64 adds a third; decides how many layers it offers.
PAGE_BYTES = 1_000_000
# Baselines beside KVP in the whole-text figures; figure 1 has room for all.
SHOWN_BASELINES = ("keydiff", "streaming-llm", "snapkv")

MONO = "DejaVu Sans Mono"
ADVANCE = 1233 / 2048  # width of every glyph of that font, in ems
LINE = 1.45  # height of a line, in ems
NEWLINE, MISSING = "↵", "▯"


@dataclass(frozen=True)
class Text:
    """One prompt of n tokens and every policy's order of them.

    Attributes
    ----------
    tokens
        n strings that read, joined, as the text.
    answers
        The reference answers, empty where there are none.
    layers
        The layers of the first axis below.
    importance
        (layers, kv_heads, n) float32, true future importance.
    ranks
        (policy, trained_on) -> (layers, kv_heads, n) int32, 0 = kept longest; in the order of legends.
    """

    model: str
    corpus: str
    task: str
    sample_id: str
    tokens: list[str]
    answers: tuple[str, ...]
    layers: list[int]
    importance: npt.NDArray[np.float32]
    ranks: dict[Pair, npt.NDArray[np.int32]]

    @property
    def kv_heads(self) -> list[int]:
        """KV heads of a layer."""
        return list(range(self.importance.shape[1]))

    def answer_tokens(self) -> range:
        """The tokens of the first answer, where it first stands in the text; empty where it does not."""
        ends = np.cumsum([len(token) for token in self.tokens])
        place = "".join(self.tokens).find(self.answers[0]) if self.answers else -1
        if place < 0:
            return range(0)
        first, last = np.searchsorted(ends, [place, place + len(self.answers[0]) - 1], side="right")
        return range(int(first), int(last) + 1)

    def window(self, size: int) -> range:
        """At most ``size`` neighbouring tokens: around the answer, or the last ones where there is none."""
        n, answer = len(self.tokens), self.answer_tokens()
        middle = (answer.start + answer.stop) // 2 if answer else n
        start = max(0, min(middle - size // 2, n - size))
        return range(start, min(start + size, n))


def read_texts(examples: Path, samples: Path, matrix: MatrixParams) -> list[Text]:
    """The example texts of the matrix, in its order.

    Raises
    ------
    PipelineError
        A table is missing, or lacks tokens, heads or policies.
    """
    found = []
    for model in matrix.model:
        for corpus in matrix.corpus:
            path = examples / model / corpus / "tokens.parquet"
            table = tables.read_table(path, TOKEN_COLUMNS)
            rows = tables.read_table(samples / model / corpus / "test.parquet", ("sample_id", "answers"))
            answers = dict(rows.iter_rows())
            for (sample_id,), part in table.group_by("sample_id", maintain_order=True):
                found.append(_text(path, model, corpus, part, tuple(answers.get(sample_id, ()))))
    return found


def drawings(texts: Sequence[Text], budget: int, report: ReportParams) -> list[Drawing]:
    """Figures 1, 8, 9 and 12 of each model.

    Figure 1 is the surroundings of an answer by all policies; 8 the same text as a whole, 12 a second text
    of its corpus and 9 one of another corpus, as far as there are such texts, each by a different layer.

    Parameters
    ----------
    budget
        Tokens that are called kept.
    """
    found = []
    for model in dict.fromkeys(text.model for text in texts):
        ours = [text for text in texts if text.model == model]
        first = ours[0]
        layer, kv_head = example_head(first.layers, first.kv_heads, report)
        if answer := first.answer_tokens():
            found.append(_excerpt_drawing(first, layer, kv_head, budget, answer))
        early, _, late = figure_layers(first, report)
        second = next((text for text in ours[1:] if text.corpus == first.corpus), None)
        other = next((text for text in ours if text.corpus != first.corpus), None)
        for paper, text, shown_layer in (("8", first, early), ("9", other, layer), ("12", second, late)):
            if text is not None:
                found.append(_whole_drawing(paper, text, shown_layer, kv_head, budget))
    return found


def figure_layers(text: Text, report: ReportParams) -> tuple[int, int, int]:
    """The layers of the figures: a quarter into the model, the example layer, three quarters into it."""
    example, _ = example_head(text.layers, text.kv_heads, report)
    return text.layers[len(text.layers) // 4], example, text.layers[3 * len(text.layers) // 4]


def draw_panels(
    text: Text, layer: int, kv_head: int, budget: int, window: range, pairs: Sequence[Pair], columns: int, advance: int
) -> Figure:
    """One panel for each policy: its name, what it keeps, and the text in its colours.

    Parameters
    ----------
    columns
        Panels beside each other.
    advance
        Width of a letter in pixels. A whole number: renderers round it, and letters would leave their boxes.
    """
    size = advance / ADVANCE * 72 / DPI  # points
    pairs = list(pairs)
    width, gap, margin = 10.8, 0.3, 0.15  # inches
    panel = (width - gap * (columns - 1)) / columns
    letter, line = ADVANCE * size / 72, LINE * size / 72
    lines = wrap([text.tokens[i] for i in window], int(panel / letter))
    heading, legend = 0.5, 0.55
    block = heading + line * len(lines) + 0.12
    rows = -(-len(pairs) // columns)
    height = 2 * margin + legend + block * rows
    figure = Figure(figsize=(width + 2 * margin, height))
    FigureCanvasAgg(figure)
    _draw_legend(figure, (margin, height - margin - legend), budget, len(text.tokens))
    head = (text.layers.index(layer), kv_head)
    importance = text.importance[head]
    for place, pair in enumerate(pairs):
        ranks = text.ranks[pair][head]
        left = margin + (place % columns) * (panel + gap)
        top = height - margin - legend - (place // columns) * block
        kept = importance[ranks < budget].sum() / importance.sum()
        note = f"keeps {kept:.0%}"
        if answer := text.answer_tokens():
            note += f"; all of the answer from {ranks[answer.start : answer.stop].max() + 1} tokens"
        label = "True future importance" if pair[0] == "oracle" else names.label(*pair)
        figure.text(left / figure.get_figwidth(), (top - 0.17) / height, label, fontsize=11, fontweight="bold")
        figure.text(left / figure.get_figwidth(), (top - 0.36) / height, note, fontsize=8.5, color="#444444")
        axes = _axes(figure, left, top - heading - line * len(lines), panel, line * len(lines))
        axes.set_xlim(0, panel / letter)
        _draw_text(axes, lines, ranks[window.start : window.stop], len(ranks), budget, size)
    return figure


def wrap(tokens: Sequence[str], columns: int) -> list[list[tuple[str, int]]]:
    """Lay a text out in lines of at most ``columns`` characters, broken between words and behind newlines.

    Returns
    -------
    Lines of (character, index of its token). Newlines are shown as ``↵``, characters without a glyph in the
    figures' font as ``▯``; nothing is left out.
    """
    glyphs = get_font(findfont(FontProperties(family=MONO))).get_charmap()
    lines: list[list[tuple[str, int]]] = [[]]
    word: list[tuple[str, int]] = []

    def flush() -> None:
        if lines[-1] and len(lines[-1]) + len(word) > columns:
            lines.append([])
        for cell in word:  # a word longer than a line is cut
            if len(lines[-1]) == columns:
                lines.append([])
            lines[-1].append(cell)
        word.clear()

    for index, token in enumerate(tokens):
        for place, letter in enumerate(token):
            if letter.isspace() and word and not word[-1][0].isspace():
                flush()
            if letter == "\n":
                word.append((NEWLINE, index))
                if not token[place + 1 :].startswith("\n"):
                    flush()
                    lines.append([])
            else:
                shown = " " if letter.isspace() else letter if ord(letter) in glyphs else MISSING
                word.append((shown, index))
    flush()
    return [line for line in lines if line]


def ramps() -> tuple[list[str], list[str]]:
    """Backgrounds of kept and of evicted tokens, from kept longest to evicted first."""
    colour_map = matplotlib.colormaps[COLOUR_MAP]
    kept, evicted = (
        [matplotlib.colors.to_hex(colour) for colour in colour_map(np.linspace(*part, STEPS))]
        for part in (KEPT_PART, EVICTED_PART)
    )
    return kept, evicted


def backgrounds(ranks: npt.NDArray[np.int32], n: int, budget: int) -> list[str]:
    """The background of each rank in a cache of n tokens of which ``budget`` are kept."""
    kept, evicted = ramps()
    return [
        kept[rank * STEPS // budget] if rank < budget else evicted[(rank - budget) * STEPS // (n - budget)]
        for rank in ranks.tolist()
    ]


def levels(ranks: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.uint8]:
    """Ranks 0 .. n - 1 as levels 0 .. 255."""
    return np.round(ranks * ((LEVELS - 1) / max(n - 1, 1))).astype(np.uint8)


def page_block(texts: Sequence[Text], budget: int, report: ReportParams) -> dict[str, Any]:
    """What the page's block of coloured texts is built from, JSON-serialisable.

    ``ranks`` is base64 of uint8 levels (policies, layers, kv_heads, tokens). ``importance`` is base64 of the upper
    halves of float32 (bfloat16, cut off), little endian, (layers, kv_heads, tokens). Where all layers would exceed
    ``PAGE_BYTES``, evenly spaced ones are offered, and those of the figures.
    """
    block = []
    windows = [text.window(PAGE) for text in texts]
    per_layer = sum(
        len(window) * len(text.kv_heads) * (len(text.ranks) + 2) for text, window in zip(texts, windows, strict=True)
    )
    for text, window in zip(texts, windows, strict=True):
        n, part = len(text.tokens), slice(window.start, window.stop)
        example, kv_head = example_head(text.layers, text.kv_heads, report)
        shown = sorted(
            {*figure_layers(text, report)}.union(evenly_spaced(text.layers, max(2, PAGE_BYTES // per_layer)))
        )
        rows = [text.layers.index(layer) for layer in shown]
        ranks = np.stack([levels(ranks[rows, :, part], n) for ranks in text.ranks.values()])
        importance = text.importance[rows, :, part].astype("<f4").view("<u4") >> 16
        block.append(
            {
                "id": f"{text.model}~{text.sample_id}",
                "title": f"{names.corpus_title(text.corpus)}: {text.task} ({text.model})",
                "tokens": text.tokens[part],
                "start": window.start,
                "total": n,
                "layers": shown,
                "kv_heads": text.kv_heads,
                "policies": [
                    {
                        "id": f"{policy}@{trained_on}" if trained_on else policy,
                        "label": names.label(policy, trained_on),
                    }
                    for policy, trained_on in text.ranks
                ],
                "ranks": base64.b64encode(ranks.tobytes()).decode(),
                "importance": base64.b64encode(importance.astype("<u2").tobytes()).decode(),
                "layer": example,
                "kv_head": kv_head,
                "kept": min(100, round(100 * budget / n)),
            }
        )
    return {
        "texts": block,
        "ramps": ramps(),
        "inks": (KEPT_INK, EVICTED_INK),
        "top": LEVELS - 1,
        "all_layers": max((len(text.layers) for text in texts), default=0),
    }


def _text(path: Path, model: str, corpus: str, part: pl.DataFrame, answers: tuple[str, ...]) -> Text:
    layers, kv_heads = part["layer"].unique().sort().to_list(), part["kv_head"].n_unique()
    pairs = tables.series(part)
    n = part["position"].n_unique()
    shape = (len(layers), kv_heads, n)
    by_policy = {pair: tables.select(part, *pair).sort("layer", "kv_head", "position") for pair in pairs}
    if any(rows.height != np.prod(shape) for rows in by_policy.values()):
        raise PipelineError(f"{path} lacks tokens, heads or policies; run the examples stage again.")
    one = by_policy[pairs[0]]
    return Text(
        model=model,
        corpus=corpus,
        task=part["task"][0],
        sample_id=part["sample_id"][0],
        tokens=one["token"].head(n).to_list(),
        answers=answers,
        layers=layers,
        importance=one["importance"].to_numpy().reshape(shape),
        ranks={pair: rows["rank"].to_numpy().reshape(shape) for pair, rows in by_policy.items()},
    )


def _excerpt_drawing(text: Text, layer: int, kv_head: int, budget: int, answer: range) -> Drawing:
    window = text.window(EXCERPT)
    shown = tables.reference_policy(pl.DataFrame({"policy": [policy for policy, _ in text.ranks]}))
    pairs = [
        pair
        for pair in text.ranks
        if pair[0] == shown or (names.style(*pair).kind not in ("kvp", "ceiling") and pair[0] != "random")
    ]
    return Drawing(
        f"fig01_{text.model}_{text.corpus}_tokens_around_the_answer.png",
        "1",
        f"What each policy would keep around the answer, {_where(text, layer, kv_head)}",
        f"Tokens {window.start} to {window.stop - 1} of {len(text.tokens)}; the answer stands at {answer.start} to "
        f"{answer.stop - 1}. {_colour_note(budget)}",
        lambda: draw_panels(text, layer, kv_head, budget, window, pairs, columns=3, advance=8),
    )


def _whole_drawing(paper: str, text: Text, layer: int, kv_head: int, budget: int) -> Drawing:
    window = text.window(WHOLE)
    shown = tables.reference_policy(pl.DataFrame({"policy": [policy for policy, _ in text.ranks]}))
    pairs = [pair for pair in text.ranks if pair[0] in ("oracle", shown, *SHOWN_BASELINES)]
    extent = "The whole prompt" if len(window) == len(text.tokens) else f"Tokens {window.start} to {window.stop - 1}"
    return Drawing(
        f"fig{int(paper):02d}_{text.model}_{text.corpus}_tokens.png",
        paper,
        f"What each policy would keep of a text, {_where(text, layer, kv_head)}",
        f"{extent}, {len(text.tokens)} tokens in all. {_colour_note(budget)}",
        lambda: draw_panels(text, layer, kv_head, budget, window, pairs, columns=2, advance=6),
    )


def _where(text: Text, layer: int, kv_head: int) -> str:
    task = f"{names.corpus_title(text.corpus)} ({text.task})"
    return f"layer {layer}, head {kv_head} on {task}, {text.model}"


def _colour_note(budget: int) -> str:
    return (
        "Each token is coloured by its rank in the policy's own order, before any token is protected: dark where a "
        f"budget of {budget} tokens keeps it. The policies see the prompt only; the true importance "
        "is the attention that the reference continuation pays. Every layer, head and policy: block below the figures."
    )


def _draw_text(
    axes: Axes,
    lines: Sequence[Sequence[tuple[str, int]]],
    ranks: npt.NDArray[np.int32],
    n: int,
    budget: int,
    size: float,
) -> None:
    axes.set_ylim(len(lines), 0)
    shades = backgrounds(ranks, n, budget)
    boxes, fills = [], []
    for row, line in enumerate(lines):
        token = np.array([index for _, index in line])
        starts = np.flatnonzero(np.diff(token, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(token)], strict=True):
            # A hair of paper between tokens shows where one ends.
            left, right, top, bottom = start + 0.05, stop - 0.05, row + 0.04, row + 0.96
            boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
            fills.append(shades[token[start]])
        # One text object for each ink of a line, the other letters left out: the font is monospaced.
        inks = [KEPT_INK if ranks[index] < budget else EVICTED_INK for index in token]
        for ink in sorted(set(inks)):
            letters = "".join(letter if own == ink else " " for (letter, _), own in zip(line, inks, strict=True))
            axes.text(
                0, row + 0.72, letters.rstrip(), fontsize=size, color=ink, family=MONO, parse_math=False, va="baseline"
            )
    axes.add_collection(PolyCollection(boxes, facecolors=fills, linewidths=0), autolim=False)


def _draw_legend(figure: Figure, place: tuple[float, float], budget: int, n: int) -> None:
    left, bottom = place
    axes = _axes(figure, left, bottom + 0.24, 3.6, 0.16)
    colours = [matplotlib.colors.to_rgb(colour) for colour in backgrounds(np.arange(n, dtype=np.int32), n, budget)]
    axes.imshow([colours], extent=(0, n, 0, 1), aspect="auto", interpolation="nearest")
    for rank, text, align in ((0, "kept longest", "left"), (n, "evicted first", "right")):
        axes.text(rank, -0.35, text, fontsize=8.5, ha=align, va="top")
    axes.text(budget, 1.25, f"{budget} of {n} tokens", fontsize=8.5, ha="center", va="bottom")
    note = (
        f"Dark: kept at a budget of {budget} tokens; light: evicted. {NEWLINE} is a line break.\n"
        "Above each text: share of the future attention that is kept, and the budget that keeps all of the answer."
    )
    figure.text((left + 3.9) / figure.get_figwidth(), (bottom + 0.2) / figure.get_figheight(), note, fontsize=8.5)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes without a frame at a place given in inches."""
    wide, high = figure.get_figwidth(), figure.get_figheight()
    axes = figure.add_axes((left / wide, bottom / high, width / wide, height / high))
    axes.set_axis_off()
    return axes
