"""Prompts with every policy's order of their tokens, and what the page's block of coloured texts carries of them.

It ranks nothing (``pipeline/evaluation/texts.py`` made the tables) and draws nothing (``text_figures.py``).
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.errors import PipelineError
from pipeline.reporting.aggregate import select, series
from pipeline.reporting.colours import EVICTED_INK, KEPT_INK, ramps
from pipeline.reporting.drawing import evenly_spaced, example_head
from pipeline.reporting.params import ReportParams
from pipeline.reporting.read import read_table
from pipeline.reporting.run import Run
from pipeline.reporting.styles import Pair, Styles, policy_name
from pipeline.tables import TOKENS

LEVELS = 256  # of the ranks on the page
# Tokens of a text on the page; longer texts are cut to a window.
PAGE = 5_000
# Bytes of ranks that the page may carry, before base64 adds a third; decides how many layers it offers.
PAGE_BYTES = 1_000_000


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
    benchmark: str
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


def read_texts(
    paths: Mapping[tuple[str, str], Path], samples: Mapping[tuple[str, str], Path], styles: Styles
) -> list[Text]:
    """The texts of each (model, benchmark) of ``paths``, in that order, with the answers of ``samples``.

    Raises
    ------
    PipelineError
        A table is missing, or lacks tokens, heads or policies.
    """
    found = []
    for (model, benchmark), path in paths.items():
        table = read_table(path, TOKENS)
        answers = dict(read_table(samples[model, benchmark], ("sample_id", "answers")).iter_rows())
        for (sample_id,), part in table.group_by("sample_id", maintain_order=True):
            found.append(_text(path, model, benchmark, part, tuple(answers.get(sample_id, ())), styles))
    return found


def figure_layers(text: Text, report: ReportParams) -> tuple[int, int, int]:
    """The layers of the figures: a quarter into the model, the example layer, three quarters into it."""
    example, _ = example_head(text.layers, text.kv_heads, report)
    return text.layers[len(text.layers) // 4], example, text.layers[3 * len(text.layers) // 4]


def levels(ranks: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.uint8]:
    """Ranks 0 .. n - 1 as levels 0 .. 255."""
    return np.round(ranks * ((LEVELS - 1) / max(n - 1, 1))).astype(np.uint8)


def page_block(texts: Sequence[Text], run: Run) -> dict[str, Any]:
    """What the page's block of coloured texts is built from, JSON-serialisable.

    ``ranks`` is base64 of uint8 levels (policies, layers, kv_heads, tokens). ``importance`` is base64 of the upper
    halves of float32 (bfloat16, cut off), little endian, (layers, kv_heads, tokens). Where all layers would exceed
    ``PAGE_BYTES``, evenly spaced ones are offered, and those of the figures.
    """
    block = []
    per_layer = sum(len(text.window(PAGE)) * len(text.kv_heads) * (len(text.ranks) + 2) for text in texts)
    for text in texts:
        window = text.window(PAGE)
        n, part = len(text.tokens), slice(window.start, window.stop)
        example, kv_head = example_head(text.layers, text.kv_heads, run.report)
        spread = evenly_spaced(text.layers, max(2, PAGE_BYTES // per_layer))
        shown = sorted({*figure_layers(text, run.report), *spread})
        rows = [text.layers.index(layer) for layer in shown]
        ranks = np.stack([levels(ranks[rows, :, part], n) for ranks in text.ranks.values()])
        importance = text.importance[rows, :, part].astype("<f4").view("<u4") >> 16
        block.append(
            {
                "id": f"{text.model}~{text.sample_id}",
                "title": f"{run.styles.title(text.benchmark)}: {text.task} ({text.model})",
                "tokens": text.tokens[part],
                "start": window.start,
                "total": n,
                "layers": shown,
                "kv_heads": text.kv_heads,
                "policies": [{"id": policy_name(*pair), "label": run.styles.label(*pair)} for pair in text.ranks],
                "ranks": base64.b64encode(ranks.tobytes()).decode(),
                "importance": base64.b64encode(importance.astype("<u2").tobytes()).decode(),
                "layer": example,
                "kv_head": kv_head,
                "kept": min(100, round(100 * run.middle_budget / n)),
            }
        )
    return {
        "texts": block,
        "ramps": ramps(),
        "inks": (KEPT_INK, EVICTED_INK),
        "top": LEVELS - 1,
        "all_layers": max((len(text.layers) for text in texts), default=0),
    }


def _text(path: Path, model: str, benchmark: str, part: pl.DataFrame, answers: tuple[str, ...], styles: Styles) -> Text:
    layers, kv_heads = part["layer"].unique().sort().to_list(), part["kv_head"].n_unique()
    pairs = series(part, styles)
    n = part["position"].n_unique()
    shape = (len(layers), kv_heads, n)
    by_policy = {pair: select(part, *pair).sort("layer", "kv_head", "position") for pair in pairs}
    if any(rows.height != np.prod(shape) for rows in by_policy.values()):
        raise PipelineError(f"{path} lacks tokens, heads or policies; run the texts stage again.")
    one = by_policy[pairs[0]]
    return Text(
        model=model,
        benchmark=benchmark,
        task=part["task"][0],
        sample_id=part["sample_id"][0],
        tokens=one["token"].head(n).to_list(),
        answers=answers,
        layers=layers,
        importance=one["importance"].to_numpy().reshape(shape),
        ranks={pair: rows["rank"].to_numpy().reshape(shape) for pair, rows in by_policy.items()},
    )
