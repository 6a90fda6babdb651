"""Values that metrics.py and eval.py of github.com/THUDM/LongBench (commit 2e00731) gave for the same strings."""

import sys

import pytest

from pipeline.benchmarks.longbench import longbench_score, rouge_l
from pipeline.corpora.longbench import TASKS
from pipeline.errors import PipelineError

CLASSES = ["Date", "Order, rank", "Other number", "Order", "number", "Number of something"]


@pytest.mark.parametrize(
    ("task", "prediction", "references", "expected"),
    [
        (
            "gov_report",
            "The agency spent money. It kept no records of it.",
            ["The agency kept no records. It spent public money."],
            0.8421052581717452,
        ),
        ("gov_report", "...", ["The agency."], 0.0),
        ("gov_report", "", ["The agency."], 0.0),
        (
            "multi_news",
            "the the the cat. sat on a mat",
            ["A cat sat on the mat. The end.", "the cat sat"],
            0.6666666622222223,
        ),
        ("samsum", "\n\nAnna is late.\nDialogue: Bob: hi", ["Anna is late."], 0.999999995),
        ("samsum", "Anna\nis late.", ["Anna is late."], 0.4999999962500001),
        ("narrativeqa", "The letter, she declined to read it!", ["She declined to read it.", "nothing"], 10 / 11),
        ("hotpotqa", "a the an", ["the"], 0.0),
        ("qasper", "it's 5-percent", ["its 5percent points"], 0.8),
        ("triviaqa", "\nfifty five\n55", ["55", "fifty-five", "Fifty Five!"], 1.0),
        ("passage_retrieval_en", "Paragraph 12, not 3 but 12", ["Paragraph 12"], 2 / 3),
        ("passage_retrieval_en", "Paragraph 112", ["Paragraph 12"], 0.0),
        ("passage_retrieval_en", "twelve", ["Paragraph 12"], 0.0),
        ("passage_count", "There are 7 of 17, so 7", ["7"], 2 / 3),
        ("passage_count", "07", ["7"], 0.0),
        ("passage_count", "none", ["7"], 0.0),
        ("trec", "Order, rank", ["Order, rank"], 1.0),
        ("trec", "Order, rank or Date", ["Order, rank"], 0.5),
        ("trec", "Number of something, Other number", ["Other number"], 0.5),
        ("trec", "Order\nDate", ["Order"], 1.0),
        ("trec", "Order, rank, number, Other number", ["Other number"], 1 / 3),
        (
            "lcc",
            "\n\n# first\n// second\n```py\n    return value + 1\nmore",
            ["    return value + 2"],
            0.95,
        ),
        ("lcc", "# only", ["x = 1"], 0.0),
        ("lcc", "if text == language:", ["            if e.text == language:"], 0.74),
        ("repobench-p", "", ["", "x"], 1.0),
        # difflib ignores letters that are frequent in a long text; a true edit distance would not.
        ("repobench-p", "abcabba" * 40, ["cbabac" * 45], 0.0),
    ],
)
def test_official_values(task: str, prediction: str, references: list[str], expected: float) -> None:
    score = longbench_score(task, TASKS[task].metric, prediction, references, CLASSES if task == "trec" else None)
    assert isinstance(score, float)
    assert score == expected


def test_a_sentence_too_long_to_compare_counts_nothing() -> None:
    # LongBench's bare except does the same.
    words = " ".join(f"w{number}" for number in range(sys.getrecursionlimit() + 10))
    assert rouge_l(words, words) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qasper", "qa_f1", "a", [], None), "qa_f1 needs at least one reference"),
        (("trec", "classification", "a", ["a"], None), "classification needs the classes of 'trec'"),
        (("passage_retrieval_en", "retrieval", "1", ["1"], None), "'1' names no paragraph"),
        (("qasper", "bleu", "a", ["a"], None), "'bleu' is no metric; known: classification, rouge_l"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(arguments: tuple, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        longbench_score(*arguments)
