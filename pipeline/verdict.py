"""What the check found of a model (``pipeline/evaluation/selfcheck.py``), for the stages that compute with it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.corpora.samples import Sample
from pipeline.errors import PipelineError, one_line


@dataclass(frozen=True)
class Verdict:
    """What is known of a model that passed.

    Attributes
    ----------
    verdict
        "right"; there is no file for a model that is refused.
    tolerance
        The largest difference from transformers' own numbers that was allowed, in float32.
    tokens
        Length of the longest text tried.
    longest
        Up to how many tokens numbers do not depend on how a text is cut into calls; None for as many as it reads.
    vocabulary
        Number of token ids.
    ranked_layers, windows, heads, kv_heads, head_dim
        The model's cache, see :class:`pipeline.layout.CacheLayout`.
    """

    model: str
    dtype: str
    verdict: str
    tolerance: float
    tokens: int
    longest: int | None
    vocabulary: int
    ranked_layers: Sequence[int]
    windows: dict[str, int]
    heads: int
    kv_heads: int
    head_dim: int

    def as_json(self) -> dict[str, Any]:
        """What is written: no measured difference and no time, so that a second check gives equal bytes."""
        return asdict(self)


def read_verdict(path: Path) -> Verdict:
    """Read what the check stage wrote.

    Raises
    ------
    PipelineError
        The file is missing or unreadable.
    """
    try:
        return Verdict(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise PipelineError(
            f"{path} holds no check of a model ({one_line(error)}); run the check stage (dvc repro does)."
        ) from None


def require_readable(verdict: Verdict, samples: Sequence[Sample]) -> None:
    """Refuse texts that the model cannot read as it was checked, before the first of them is run.

    Raises
    ------
    PipelineError
        A token id is none of the model's, or a text is longer than :attr:`Verdict.longest`.
    """
    for sample in samples:
        ids = (*sample.input_ids, *(token for choice in sample.choices for token in choice))
        if not 0 <= min(ids) <= max(ids) < verdict.vocabulary:
            raise PipelineError(
                f"Sample {sample.sample_id} has a token id outside the {verdict.vocabulary} of {verdict.model}; run "
                "the samples stage again."
            )
        choices = max(map(len, sample.choices), default=0)
        length = max(len(sample.input_ids), sample.prompt_len + max(sample.max_new_tokens, choices))
        if verdict.longest is not None and length > verdict.longest:
            raise PipelineError(
                f"{verdict.model} computes positions in another way in texts of more than {verdict.longest} tokens, so "
                f"that keys cached before no longer fit; sample {sample.sample_id} has {length}: shorten the corpus or "
                "choose another model."
            )
