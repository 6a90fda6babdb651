"""The texts that are shown token by token: which samples, their tokens, and every policy's order of them.

Ranks are those of the sweep (``pipeline/evaluation/prefill.py``) before any token is protected. This file
draws nothing; ``pipeline/reporting/texts.py`` does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
import polars as pl
import torch
from pydantic import Field

from pipeline.errors import PipelineError
from pipeline.policy.ranking import rank
from pipeline.samples.sample import Sample
from pipeline.section import Name, Section
from pipeline.tables import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.evaluation.prefill import Prefill


class TextsParams(Section):
    """Texts that are shown token by token: per benchmark, the first test sample of each of these tasks.

    Of a benchmark that is not named, the first test sample.
    """

    tasks: dict[Name, Annotated[tuple[str, ...], Field(min_length=1)]]


def choose_texts(samples: Sequence[Sample], tasks: Sequence[str]) -> list[int]:
    """Indices of the first sample of each task, in the order of ``tasks``; without tasks, of the first sample.

    Raises
    ------
    PipelineError
        No sample is of a task that is asked for.
    """
    if not tasks:
        return [0]
    first: dict[str, int] = {}
    for index, sample in enumerate(samples):
        first.setdefault(sample.task, index)
    for task in tasks:
        if task not in first:
            raise PipelineError(
                f"params.yaml: texts.tasks.{samples[0].benchmark} names '{task}', of which there is no test sample; "
                f"there are {', '.join(sorted(first))}."
            )
    return [first[task] for task in tasks]


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """The text that each token adds: joined, they read as the decoded text, special tokens included.

    A token that ends inside a character adds nothing; the one that completes it adds the character.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]


def token_table(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase", prefill: "Prefill", layers: Sequence[int]
) -> pl.DataFrame:
    """Rows of tokens.parquet for one sample of n context tokens: policies x layers x kv_heads x n.

    ``layers`` are the model's numbers of the ranked layers (``pipeline/models/layers.py``).

    Returns
    -------
    The columns of ``TOKENS``. ``importance`` is the true future importance of the token at the
    whole context; ``rank`` is its place in the policy's own order, nothing protected, 0 = kept longest.
    """
    n = sample.context_len
    scores = prefill.scores[n]
    # The inverse of a ranking gives the rank of each token.
    ranks = torch.stack([rank(score).argsort(-1) for score in scores.values()], dim=-1)
    # Policies innermost: whatever they share is repeated and costs next to nothing in the file.
    layer, kv_head, position, policy = (axis.ravel() for axis in np.indices(ranks.shape, dtype=np.int32))
    texts = pl.Series(token_texts(tokenizer, sample.input_ids[:n]), dtype=pl.String)
    columns = {
        "sample_id": pl.repeat(sample.sample_id, ranks.numel(), eager=True),
        "task": pl.repeat(sample.task, ranks.numel(), eager=True),
        "policy": pl.Series([key.policy for key in scores]).gather(policy),
        "trained_on": pl.Series([key.trained_on for key in scores], dtype=pl.String).gather(policy),
        "layer": np.asarray(layers)[layer],
        "kv_head": kv_head,
        "position": position,
        "token": texts.gather(position),
        "importance": prefill.importance[n].cpu().repeat_interleave(len(scores)).numpy(),
        "rank": ranks.cpu().numpy().ravel(),
    }
    return pl.DataFrame(columns).select(pl.col(name).cast(dtype) for name, dtype in TOKENS.items())
