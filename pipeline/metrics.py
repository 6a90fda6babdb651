"""Metrics: what was said and what is right -> a number, and how a reader is told of it. They know no benchmark.

LongBench's give the values of ``metrics.py`` and ``eval.py`` of github.com/THUDM/LongBench, quirks included, RULER's
those of NVIDIA's generator, one prediction at a time and as fractions, so that numbers can be compared.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Metric:
    """How a column ``metric`` of the results is shown.

    Attributes
    ----------
    title
        What a reader sees. Of the likelihoods, ``nll``, that is the perplexity over the tokens of all samples.
    lower_is_better
        Whether a smaller number is the better one.
    """

    title: str
    lower_is_better: bool = False


METRICS = {
    "string_match": Metric("accuracy"),
    "nll": Metric("perplexity", lower_is_better=True),
    "accuracy": Metric("accuracy"),
    "accuracy_norm": Metric("normalised accuracy"),
    "rouge_l": Metric("ROUGE-L"),
    "qa_f1": Metric("F1"),
    "retrieval": Metric("accuracy"),
    "count": Metric("accuracy"),
    "classification": Metric("accuracy"),
    "code_similarity": Metric("similarity"),
}


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Fraction of the references that occur in the prediction, case ignored."""
    return sum(_occurs(reference, prediction) for reference in references) / _count(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1.0 if any of the references occurs in the prediction, case ignored, else 0.0."""
    _count(references)
    return max(_occurs(reference, prediction) for reference in references)


def most_likely(nll: Sequence[float], gold: int, lengths: Sequence[int] | None = None) -> float:
    """1.0 if the most likely choice is the right one, else 0.0 (lm-eval 0.4.13, ``process_results``).

    Parameters
    ----------
    nll
        Negative log-likelihood of each choice, nats, summed over its tokens.
    gold
        Which choice is right. Of equally likely choices the first counts.
    lengths
        Characters of each choice, where log-likelihoods are divided by them.

    Raises
    ------
    PipelineError
        None of the choices is right, or a likelihood is not finite.
    """
    scores = -np.asarray(nll, dtype=np.float64)
    count = scores.size if lengths is None else len(lengths)
    if scores.shape != (count,) or not 0 <= gold < count:
        raise PipelineError(
            f"{count} choices have {scores.size} likelihoods, choice {gold} is right; build the samples again."
        )
    if not np.isfinite(scores).all():
        raise PipelineError(
            f"The likelihoods {list(nll)} of the choices are not finite; the model overflows in its dtype, load it in "
            "bfloat16 or float32."
        )
    if lengths is not None:
        # An empty choice is infinitely unlikely, as in the harness.
        with np.errstate(divide="ignore"):
            scores = scores / lengths
    return float(scores.argmax() == gold)


def rouge_l(prediction: str, reference: str) -> float:
    """F of ROUGE-L over sentences, by the package that LongBench uses; 0.0 where it has no sentences."""
    from rouge import Rouge

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


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _occurs(reference: str, prediction: str) -> float:
    return 1.0 if reference.lower() in prediction.lower() else 0.0


def _count(references: Sequence[str]) -> int:
    if not references:
        raise PipelineError("string match needs at least one reference; the sample has no answers.")
    return len(references)
