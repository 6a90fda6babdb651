"""Ask every row of an evicted cache what a sample wants to know: write, read, choose. It knows no metric.

Policies see the whole prompt; its last token, which every budget keeps, is fed once more against the evicted cache,
so that every predicted token, the first included, comes from what is left. A late question comes after the eviction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.decode import EvictedCache, choice_nll, continuation_nll, greedy_decode
from pipeline.evaluation.evict import Rows
from pipeline.samples.sample import Ask, Sample
from pipeline.tables import PolicyKey


@dataclass(frozen=True)
class Said:
    """What one (policy, budget) pair said to one sample. ``budget`` is None for no eviction.

    Attributes
    ----------
    ask
        What was asked.
    text
        What was written, else None.
    nll
        Nats: of each token of the true continuation, or of each choice, summed over its tokens; empty for a text.
    n_tokens
        How many tokens were written or predicted; 1 for a choice.
    """

    key: PolicyKey
    budget: int | None
    ask: Ask
    text: str | None
    nll: tuple[float, ...]
    n_tokens: int


def reserve(sample: Sample) -> int:
    """Tokens that a row's cache grows by, from the context on."""
    return sample.longest_text - sample.context_len


def ask(
    sample: Sample,
    cache: EvictedCache,
    rows: Rows,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: frozenset[int],
) -> Iterator[Said]:
    """What every row says to each ``ask`` of a sample; the cache is of no more use afterwards."""
    last = sample.context_len - 1
    first_tokens = sample.input_ids[last : sample.prompt_len]
    # Likelihoods come first: generating drops the rows that have finished.
    if "choice" in sample.ask:
        nll = choice_nll(model, cache, first_tokens, sample.choices, last)
        for (key, budget), values in zip(rows, nll.tolist(), strict=True):
            yield Said(key, budget, "choice", None, tuple(values), 1)
    if "likelihood" in sample.ask:
        # Tokens of a late question are read, not predicted.
        predicted = len(sample.input_ids) - sample.prompt_len
        nll = continuation_nll(model, cache, torch.tensor(sample.input_ids[last:]), last)[:, -predicted:]
        for (key, budget), values in zip(rows, nll.tolist(), strict=True):
            yield Said(key, budget, "likelihood", None, tuple(values), predicted)
        cache.rewind()
    if "text" not in sample.ask:
        return

    def text(tokens: Sequence[int]) -> str:
        decoded = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)
        return decoded

    def is_finished(tokens: list[int]) -> bool:
        written = text(tokens).lower() if sample.enough else ""
        enough = (all(part.lower() in written for part in group) for group in sample.enough)
        return tokens[-1] in end_tokens or any(enough)

    generated = greedy_decode(model, cache, first_tokens, last, sample.max_new_tokens, is_finished)
    for (key, budget), tokens in zip(rows, generated, strict=True):
        yield Said(key, budget, "text", text(tokens), (), len(tokens))
