"""Figures 1, 8, 9 and 12: texts whose tokens are coloured by their place in a policy's order. It ranks nothing."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from pipeline.reporting.colours import EVICTED_INK, KEPT_INK, backgrounds
from pipeline.reporting.drawing import DPI, Drawing, example_head
from pipeline.reporting.run import Run
from pipeline.reporting.styles import Pair, Styles
from pipeline.reporting.texts import Text, figure_layers
from pipeline.tables import ORACLE

# Tokens of figure 1 and of a whole-text figure; longer texts are cut to a window.
EXCERPT, WHOLE = 72, 1_200
# Baselines beside KVP in the whole-text figures; figure 1 has room for all.
SHOWN_BASELINES = ("keydiff", "streaming-llm", "snapkv")

MONO = "DejaVu Sans Mono"
ADVANCE = 1233 / 2048  # width of every glyph of that font, in ems
LINE = 1.45  # height of a line, in ems
NEWLINE, MISSING = "↵", "▯"


def drawings(texts: Sequence[Text], run: Run) -> list[Drawing]:
    """Figures 1, 8, 9 and 12 of each model, at the middle budget.

    Figure 1 is the surroundings of an answer by all policies; 8 the same text as a whole, 12 a second text
    of its benchmark and 9 one of another benchmark, as far as there are such texts, each by a different layer.
    """
    budget = run.middle_budget
    found = []
    for model in dict.fromkeys(text.model for text in texts):
        ours = [text for text in texts if text.model == model]
        first = ours[0]
        layer, kv_head = example_head(first.layers, first.kv_heads, run.report)
        if answer := first.answer_tokens():
            found.append(_excerpt_drawing(first, layer, kv_head, budget, answer, run.styles))
        early, _, late = figure_layers(first, run.report)
        second = next((text for text in ours[1:] if text.benchmark == first.benchmark), None)
        other = next((text for text in ours if text.benchmark != first.benchmark), None)
        for paper, text, shown_layer in (("8", first, early), ("9", other, layer), ("12", second, late)):
            if text is not None:
                found.append(_whole_drawing(paper, text, shown_layer, kv_head, budget, run.styles))
    return found


def draw_panels(
    text: Text,
    layer: int,
    kv_head: int,
    budget: int,
    window: range,
    pairs: Sequence[Pair],
    styles: Styles,
    *,
    columns: int,
    advance: int,
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
    width, gap, margin = 10.8, 0.3, 0.15  # inches
    panel = (width - gap * (columns - 1)) / columns
    letter, line = ADVANCE * size / 72, LINE * size / 72
    lines = wrap([text.tokens[i] for i in window], int(panel / letter))
    heading, legend = 0.5, 0.55
    block = heading + line * len(lines) + 0.12
    rows = -(-len(pairs) // columns)
    height = 2 * margin + legend + block * rows
    figure = Figure(figsize=(width + 2 * margin, height))
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
        label = "True future importance" if pair[0] == ORACLE.policy else styles.label(*pair)
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


def _excerpt_drawing(text: Text, layer: int, kv_head: int, budget: int, answer: range, styles: Styles) -> Drawing:
    window = text.window(EXCERPT)
    pairs = [
        pair
        for pair in text.ranks
        if pair[0] == styles.reference or (styles.style(*pair).kind not in ("kvp", "ceiling") and pair[0] != "random")
    ]
    return Drawing(
        f"fig01_{text.model}_{text.benchmark}_tokens_around_the_answer.png",
        "1",
        f"What each policy would keep around the answer, {_where(text, layer, kv_head, styles)}",
        f"Tokens {window.start} to {window.stop - 1} of {len(text.tokens)}; the answer stands at {answer.start} to "
        f"{answer.stop - 1}. {_colour_note(budget)}",
        lambda: draw_panels(text, layer, kv_head, budget, window, pairs, styles, columns=3, advance=8),
    )


def _whole_drawing(paper: str, text: Text, layer: int, kv_head: int, budget: int, styles: Styles) -> Drawing:
    window = text.window(WHOLE)
    pairs = [pair for pair in text.ranks if pair[0] in (ORACLE.policy, styles.reference, *SHOWN_BASELINES)]
    extent = "The whole prompt" if len(window) == len(text.tokens) else f"Tokens {window.start} to {window.stop - 1}"
    return Drawing(
        f"fig{int(paper):02d}_{text.model}_{text.benchmark}_tokens.png",
        paper,
        f"What each policy would keep of a text, {_where(text, layer, kv_head, styles)}",
        f"{extent}, {len(text.tokens)} tokens in all. {_colour_note(budget)}",
        lambda: draw_panels(text, layer, kv_head, budget, window, pairs, styles, columns=2, advance=6),
    )


def _where(text: Text, layer: int, kv_head: int, styles: Styles) -> str:
    task = f"{styles.title(text.benchmark)} ({text.task})"
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
