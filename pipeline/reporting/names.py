"""Names, order, colours and dashes of everything that is plotted or tabulated. It knows no numbers.

Colours are Okabe and Ito's, told apart with any colour vision; markers tell the lines apart in print.
Attention-based policies, which see the question, are dashed (paper, figure 2).
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.params import RULER_TASKS

Kind = Literal["ceiling", "oracle", "kvp", "attention-free", "attention-based"]
Dashes = Literal["-", "--", ":"]

# Letters of the paper: KVP_R is trained on RULER, KVP_S on dialogues.
CORPUS_LETTERS = {"ruler": "R", "dialogues": "S", "oasst2": "S", "oasst1": "S"}

# A stand-in is called by its own name wherever its numbers appear.
CORPUS_TITLES = {
    "ruler": "RULER",
    "dialogues": "Doc2Dial dialogues",
    "oasst2": "OASST2",
    "oasst1": "OASST1",
    "boolq": "BoolQ",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "hellaswag": "HellaSwag",
    "gov_report": "GovReport",
    "passage_retrieval": "passage retrieval",
    "longbench": "LongBench",
}

# Metric of evaluation.parquet -> what is shown. Perplexity pools the log-likelihoods of all tokens.
SHOWN_METRICS = {
    "string_match": "accuracy",
    "nll": "perplexity",
    "accuracy_norm": "normalised accuracy",
    "rouge_l": "ROUGE-L",
    "qa_f1": "F1",
    "retrieval": "accuracy",
    "count": "accuracy",
    "classification": "accuracy",
    "code_similarity": "similarity",
}
LOWER_IS_BETTER = frozenset({"perplexity", "normalised_cost"})


@dataclass(frozen=True)
class Style:
    """How one policy is drawn and in which place it is listed."""

    label: str
    kind: Kind
    colour: str
    dashes: Dashes
    width: float
    marker: str
    order: int


_POLICIES: dict[str, Style] = {
    "full": Style("No eviction", "ceiling", "#444444", "-", 1.4, "", 0),
    "oracle": Style("Oracle", "oracle", "#000000", ":", 1.8, "", 1),
    "kvp-exact": Style("KVP_{} exact", "kvp", "", "-", 3.0, "o", 2),
    "kvp-rloo": Style("KVP_{} rloo", "kvp", "", "-", 1.2, "o", 3),
    "lagkv": Style("LagKV", "attention-free", "#009E73", "-", 1.4, "s", 4),
    "keydiff": Style("KeyDiff", "attention-free", "#CC79A7", "-", 1.4, "D", 5),
    "knorm": Style("K-Norm", "attention-free", "#56B4E9", "-", 1.4, "^", 6),
    "streaming-llm": Style("StreamingLLM", "attention-free", "#E69F00", "-", 1.4, "v", 7),
    "random": Style("Random", "attention-free", "#999999", "-", 1.4, "x", 8),
    "snapkv": Style("SnapKV", "attention-based", "#6A3D9A", "--", 1.4, "P", 9),
    "tova": Style("TOVA", "attention-based", "#7A4B1E", "--", 1.4, "X", 10),
}
_KVP_COLOURS = {"R": "#0072B2", "S": "#D55E00"}
_OTHER_COLOUR = "#882255"


def corpus_letter(corpus: str) -> str:
    """Subscript of a policy trained on ``corpus``: the paper's letter, or the corpus' own name."""
    return CORPUS_LETTERS.get(corpus, corpus)


def corpus_title(corpus: str) -> str:
    """What a reader sees for a corpus or benchmark."""
    return CORPUS_TITLES.get(corpus, corpus)


def style(policy: str, trained_on: str | None = None) -> Style:
    """Style of a policy as named in the results tables; unknown policies are drawn, under their own name."""
    known = _POLICIES.get(policy)
    if known is None:
        return Style(policy, "attention-free", _OTHER_COLOUR, "-", 1.4, "*", 11)
    if known.kind != "kvp":
        return known
    letter = corpus_letter(trained_on or "?")
    colour = _KVP_COLOURS.get(letter, _OTHER_COLOUR)
    marker = "o" if letter == "R" else "h"
    return Style(known.label.format(letter), "kvp", colour, known.dashes, known.width, marker, known.order)


def label(policy: str, trained_on: str | None = None) -> str:
    """What a reader sees for a policy."""
    return style(policy, trained_on).label


def order(policy: str, trained_on: str | None) -> tuple[int, str]:
    """Sort key of legends and tables."""
    return style(policy, trained_on).order, corpus_letter(trained_on or "")


def task_order(task: str) -> tuple[int, str]:
    """Sort key of tasks: RULER's in RULER's own order."""
    return RULER_TASKS.index(task) if task in RULER_TASKS else len(RULER_TASKS), task
