"""Accuracy of a multiple choice as the EleutherAI harness counts it. It knows no model and no prompt."""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import PipelineError


def choice_outcome(nll: Sequence[float], answers: Sequence[str], metric: str, gold: int | None) -> float:
    """1.0 if the most likely choice is the right one, else 0.0 (lm-eval 0.4.13, ``process_results``).

    Parameters
    ----------
    nll
        Negative log-likelihood of each choice, nats, summed over its tokens.
    answers
        The choices' texts, without the space that comes before them.
    metric
        ``accuracy``, or ``accuracy_norm``: log-likelihoods are divided by the characters of their choice.
    gold
        Which choice is right. Of equally likely choices the first counts.

    Raises
    ------
    PipelineError
        The metric is neither, none of the choices is right, or a likelihood is not finite.
    """
    if metric not in ("accuracy", "accuracy_norm") or gold is None:
        raise PipelineError(f"'{metric}' with the right choice {gold} is no multiple choice; build the samples again.")
    scores = -np.asarray(nll, dtype=np.float64)
    if scores.shape != (len(answers),) or not 0 <= gold < len(answers):
        raise PipelineError(
            f"{len(answers)} choices have {scores.size} likelihoods, choice {gold} is right; build the samples again."
        )
    if not np.isfinite(scores).all():
        raise PipelineError(
            f"The likelihoods {list(nll)} of the choices are not finite; the model overflows in its dtype, load it in "
            "bfloat16 or float32."
        )
    if metric == "accuracy_norm":
        # An empty choice is infinitely unlikely, as in the harness.
        with np.errstate(divide="ignore"):
            scores = scores / [len(answer) for answer in answers]
    return float(scores.argmax() == gold)
