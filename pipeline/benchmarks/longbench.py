"""LongBench's metrics for English tasks, one prediction and one reference at a time, as fractions.

They give the values of ``metrics.py`` and ``eval.py`` of github.com/THUDM/LongBench, quirks included, so that
numbers can be compared. They know no model and no prompt.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from rouge import Rouge

from pipeline.errors import PipelineError

# Only the first line of these predictions counts: a model goes on with a further example.
FIRST_LINE_TASKS = ("trec", "triviaqa", "samsum")


def rouge_l(prediction: str, reference: str) -> float:
    """F of ROUGE-L over sentences, by the package that LongBench uses; 0.0 where it has no sentences."""
    try:
        scores = Rouge(metrics=["rouge-l"]).get_scores([prediction], [reference])
    # The package recurses once per word of a sentence; LongBench, too, counts what is too long as 0.
    except (ValueError, RecursionError):
        return 0.0
    return float(scores[0]["rouge-l"]["f"])


def qa_f1(prediction: str, reference: str) -> float:
    """F1 over words without case, punctuation and articles."""
    predicted, expected = _words(prediction), _words(reference)
    common = (Counter(predicted) & Counter(expected)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def retrieval(prediction: str, reference: str) -> float:
    """Fraction of the numbers in the prediction that are the number of the reference's ``Paragraph N``."""
    found = re.search(r"Paragraph (\d+)", reference)
    if found is None:
        raise PipelineError(f"'{reference}' names no paragraph; a retrieval answer must read 'Paragraph 7'.")
    return count(prediction, found[1])


def count(prediction: str, reference: str) -> float:
    """Fraction of the numbers in the prediction that are the reference; 0.0 where there are none."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (classes named in the prediction) if the reference is among them, else 0.0."""
    named = [name for name in classes if name in prediction]
    # Names inside the reference's do not count. The loop skips the name after one it removes, as the original.
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1 / len(named) if reference in named else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    """Similarity of the first line that is neither comment nor fence, in whole hundredths.

    LongBench calls ``fuzzywuzzy.fuzz.ratio``, which rests on difflib unless python-Levenshtein, which it does
    not ask for, is there.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


METRICS: dict[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l,
    "qa_f1": qa_f1,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
}


def longbench_score(
    task: str, metric: str, prediction: str, references: Sequence[str], classes: Sequence[str] | None
) -> float:
    """The best score over all references.

    Parameters
    ----------
    task
        LongBench's name of the task.
    metric
        A key of ``METRICS``, or ``classification``.
    classes
        All class names of a classification, else None.

    Raises
    ------
    PipelineError
        The metric is unknown, there is no reference, or a classification has no classes.
    """
    if not references:
        raise PipelineError(f"{metric} needs at least one reference; the sample has no answers.")
    if task in FIRST_LINE_TASKS:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if metric == "classification":
        if not classes:
            raise PipelineError(f"classification needs the classes of '{task}'; its rows must carry all_classes.")
        return max(classification(prediction, reference, classes) for reference in references)
    if metric not in METRICS:
        raise PipelineError(f"'{metric}' is no metric; known: classification, {', '.join(METRICS)}.")
    return max(METRICS[metric](prediction, reference) for reference in references)


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
