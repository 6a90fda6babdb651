"""The section ``traces`` of params.yaml, and where it says that sequences are cut."""

from typing import Annotated

import torch
from pydantic import Field

from pipeline.section import PositiveInt, Section, Seed
from pipeline.traces.draws import generator

# A cache of one token has one order.
SMALLEST_CUT = 2


class TracesParams(Section):
    """What is kept of each sequence.

    Attributes
    ----------
    cuts
        Caches that each training sequence gives: its tokens up to a cut, which is uniform over its length.
    at_prompt_end
        The share of cuts that are the end of the prompt instead, where evaluation ranks; 0 as published.
    tokens
        Of each such cache and KV head, the expected number of tokens that are kept; None for all, as published.
    """

    cuts: PositiveInt
    at_prompt_end: Annotated[float, Field(ge=0, le=1)]
    tokens: Annotated[int, Field(ge=2)] | None
    sequences_per_shard: PositiveInt
    seed: Seed


def training_cuts(tokens: int, prompt: int, sample_id: str, params: TracesParams) -> tuple[int, ...]:
    """Cache sizes of one training sequence of ``tokens``, of which the first ``prompt`` are the prompt.

    At least one token lies behind a cut. They depend on the seed and the sample alone.
    """
    draws = torch.rand(params.cuts, 2, generator=generator(params.seed, "cuts", sample_id), dtype=torch.float64)
    cuts = []
    for place, kind in draws.tolist():
        uniform = SMALLEST_CUT + int(place * (tokens - SMALLEST_CUT))
        cuts.append(prompt if kind < params.at_prompt_end and prompt >= SMALLEST_CUT else uniform)
    return tuple(cuts)


def validation_cut(tokens: int) -> int:
    """Where a validation sequence is cut: its middle."""
    return max(SMALLEST_CUT, tokens // 2)
