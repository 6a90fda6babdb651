"""What the check found of a model (``pipeline/evaluation/selfcheck.py``), for the stages that compute with it."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.errors import PipelineError, one_line
from pipeline.samples.sample import Sample


class Verdict(BaseModel):
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
    reads
        Length of the longest text that the model was made for; None where its config does not say.
    vocabulary
        Number of token ids.
    ranked_layers, windows, heads, kv_heads, head_dim
        The model's cache, see :class:`pipeline.models.layout.CacheLayout`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    dtype: str
    verdict: str
    tolerance: float
    tokens: int
    longest: int | None
    reads: int | None
    vocabulary: int
    ranked_layers: list[int]
    windows: dict[str, int]
    heads: int
    kv_heads: int
    head_dim: int


def read_verdict(path: Path, model: str, dtype: str) -> Verdict:
    """Read what the check stage wrote of a model in a dtype.

    Raises
    ------
    PipelineError
        The file is missing or unreadable, or says something of another model or dtype.
    """
    try:
        found = Verdict.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"{path} holds no check of a model ({one_line(error)}); run the check stage (dvc repro does)."
        ) from None
    if (found.verdict, found.model, found.dtype) != ("right", model, dtype):
        raise PipelineError(
            f"{path} says '{found.verdict}' of {found.model} in {found.dtype}, not 'right' of {model} in {dtype}; run "
            "the check stage again."
        )
    return found


def require_readable(verdict: Verdict, samples: Sequence[Sample]) -> None:
    """Refuse texts that the model cannot read as it was checked, before the first of them is run.

    Raises
    ------
    PipelineError
        A token id is none of the model's, or a text is longer than :attr:`Verdict.longest` or than the model reads.
    """
    for sample in samples:
        ids = (*sample.input_ids, *(token for choice in sample.choices for token in choice))
        if not 0 <= min(ids) <= max(ids) < verdict.vocabulary:
            raise PipelineError(
                f"Sample {sample.sample_id} has a token id outside the {verdict.vocabulary} of {verdict.model}; run "
                "the samples stage again."
            )
        length = sample.longest_text
        if verdict.reads is not None and length > verdict.reads:
            raise PipelineError(
                f"Sample {sample.sample_id} has {length} tokens, and {verdict.model} reads {verdict.reads} "
                "(max_position_embeddings in its config.json); drop it, or take a model that reads more."
            )
        if verdict.longest is not None and length > verdict.longest:
            raise PipelineError(
                f"{verdict.model} computes positions in another way in texts of more than {verdict.longest} tokens, so "
                f"that keys cached before no longer fit; sample {sample.sample_id} has {length}: shorten the benchmark "
                "or choose another model."
            )
