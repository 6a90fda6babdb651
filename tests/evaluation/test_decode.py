"""Evicted decoding against the plain model and against a masked cache."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from pipeline.evaluation.decode import EvictedCache, choice_nll, continuation_nll, greedy_decode
from pipeline.evaluation.sliding import SlidingLayer
from pipeline.models.layers import full_attention_layers
from tests.conftest import FAMILIES, MakeModel

PROMPT = torch.arange(60) * 23 % 128


def prefilled(model: PreTrainedModel) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of the layers that see the whole context."""
    states = all_states(model)
    numbers = full_attention_layers(model.config)
    return [states[number][0] for number in numbers], [states[number][1] for number in numbers]


def all_states(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every token in every layer; sliding layers mask what is beyond their window."""
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPT[None, :-1], past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def empty_cache(model: PreTrainedModel, reserve: int) -> EvictedCache:
    """An evicted cache without groups, whose sliding layers hold the end of the prompt."""
    sliding = {}
    for number, states in enumerate(all_states(model)):
        if number not in full_attention_layers(model.config):
            window = model.config.sliding_window
            sliding[number] = SlidingLayer(window, *(state[0, :, -(window - 1) :] for state in states))
    return EvictedCache(reserve, sliding)


def kept(states: list[torch.Tensor], tokens: torch.Tensor) -> list[torch.Tensor]:
    """Keep ``tokens`` (rows, kv_heads, budget) of every layer."""
    return [
        layer.expand(len(tokens), -1, -1, -1).gather(2, tokens[..., None].expand(*tokens.shape, layer.shape[-1]))
        for layer in states
    ]


def reference_logits(model: PreTrainedModel, tokens: torch.Tensor, kept_heads: torch.Tensor) -> torch.Tensor:
    """Logits after the prompt when evicted tokens are masked out of eager attention, head by head.

    kept_heads: (kv_heads, budget). Eager attention adds a mask to the logits, so a mask of shape
    (1, heads, queries, keys) hides a different set of tokens from each head.
    """
    n = len(PROMPT) - 1
    total = n + len(tokens)
    visible = torch.zeros(kept_heads.shape[0], n, dtype=torch.bool)
    visible.scatter_(1, kept_heads, True)
    mask = torch.full((kept_heads.shape[0], total, total), float("-inf")).triu(1)
    mask[:, n:, :n].masked_fill_(~visible[:, None], float("-inf"))
    groups = model.config.num_attention_heads // kept_heads.shape[0]
    masks: torch.Tensor | dict[str, torch.Tensor] = mask.repeat_interleave(groups, 0)[None]
    if (window := getattr(model.config, "sliding_window", None)) is not None:
        outside = torch.ones(total, total).tril(-window).bool()
        slides = torch.full((total, total), float("-inf")).triu(1).masked_fill_(outside, float("-inf"))
        masks = {"full_attention": masks, "sliding_attention": slides[None, None]}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.cat([PROMPT[:-1], tokens])
        logits = model(ids[None], attention_mask=masks).logits[0, n:]
    model.set_attn_implementation("sdpa")
    return logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_keeping_everything_equals_the_plain_model(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    keys, values = prefilled(model)
    continuation = torch.cat([PROMPT[-1:], torch.tensor([5, 9, 77, 31, 8])])
    cache = empty_cache(model, reserve=5)
    cache.add_group(keys, values)
    nll = continuation_nll(model, cache, continuation, len(PROMPT) - 1)[0]
    with torch.no_grad():
        logits = model(torch.cat([PROMPT[:-1], continuation])[None]).logits[0, len(PROMPT) - 1 : -1]
    torch.testing.assert_close(nll, F.cross_entropy(logits, continuation[1:], reduction="none"), rtol=1e-4, atol=1e-4)

    cache = empty_cache(model, reserve=12)
    cache.add_group(keys, values)
    (generated,) = greedy_decode(model, cache, [int(PROMPT[-1])], len(PROMPT) - 1, 12, lambda tokens: False)
    with torch.no_grad():
        expected = model.generate(
            PROMPT[None],
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
    assert generated == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_late_question_is_read_before_the_answer_is_written(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    keys, values = prefilled(model)
    question = [int(PROMPT[-1]), 9, 44, 101]
    cache = empty_cache(model, reserve=3 + 12)
    cache.add_group(keys, values)
    (generated,) = greedy_decode(model, cache, question, len(PROMPT) - 1, 12, lambda tokens: False)
    text = torch.cat([PROMPT[:-1], torch.tensor(question)])
    with torch.no_grad():
        expected = model.generate(
            text[None],
            attention_mask=torch.ones_like(text[None]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
    assert generated == expected[0, len(text) :].tolist()


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("question", [[], [9, 44]], ids=["inside", "late"])
def test_choices_are_scored_as_each_on_its_own(question: list[int], family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    keys, values = prefilled(model)
    tokens = torch.arange(2, 32).expand(2, keys[0].shape[1], 30)
    choices = [(7,), (5, 9, 77), (31, 8), (7, 7, 7, 7)]
    first = [int(PROMPT[-1]), *question]
    position = len(PROMPT) - 1
    cache = empty_cache(model, reserve=len(first) + 3)
    cache.add_group(kept(keys, tokens), kept(values, tokens))
    cache.add_group(keys, values)
    found = choice_nll(model, cache, first, choices, position)
    assert found.shape == (3, 4)
    for place, choice in enumerate(choices):
        alone = empty_cache(model, reserve=len(first) + len(choice) - 1)
        alone.add_group(kept(keys, tokens), kept(values, tokens))
        alone.add_group(keys, values)
        nll = continuation_nll(model, alone, torch.tensor([*first, *choice]), position)[:, -len(choice) :].sum(1)
        torch.testing.assert_close(found[:, place], nll, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            text = torch.tensor([*PROMPT[:-1].tolist(), *first, *choice])
            logits = model(text[None]).logits[0, -len(choice) - 1 : -1].double()
        expected = F.cross_entropy(logits, torch.tensor(choice), reduction="sum")
        torch.testing.assert_close(found[2, place].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3"])
def test_eviction_equals_masking_head_by_head(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    keys, values = prefilled(model)
    generator = torch.Generator().manual_seed(0)
    groups = {
        budget: torch.stack(
            [torch.randperm(59, generator=generator)[:budget].sort().values for _ in range(3 * 2)]
        ).view(3, 2, budget)
        for budget in (7, 30)
    }
    continuation = torch.tensor([int(PROMPT[-1]), 5, 9, 77, 31, 8])
    cache = empty_cache(model, reserve=5)
    for tokens in groups.values():
        cache.add_group(kept(keys, tokens), kept(values, tokens))
    nll = continuation_nll(model, cache, continuation, len(PROMPT) - 1)
    rows = [head_tokens for tokens in groups.values() for head_tokens in tokens]
    for row, head_tokens in enumerate(rows):
        logits = reference_logits(model, continuation[:-1], head_tokens)
        expected = F.cross_entropy(logits, continuation[1:], reduction="none")
        torch.testing.assert_close(nll[row], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_finished_rows_leave_and_the_others_go_on_unchanged(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    keys, values = prefilled(model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.stack([torch.randperm(59, generator=generator)[:20].sort().values for _ in range(8)]).view(4, 2, 20)

    def decode(is_finished):  # type: ignore[no-untyped-def]
        cache = empty_cache(model, reserve=10)
        cache.add_group(kept(keys, tokens), kept(values, tokens))
        cache.add_group(keys, values)
        return greedy_decode(model, cache, [int(PROMPT[-1])], len(PROMPT) - 1, 10, is_finished)

    whole = decode(lambda generated: False)
    early = whole[1][3]
    stopped = decode(lambda generated: generated[-1] == early)
    for complete, cut in zip(whole, stopped, strict=True):
        length = complete.index(early) + 1 if early in complete else 10
        assert cut == complete[:length]
    assert len(stopped[1]) <= 4


def test_memory_falls_with_the_budget(make_model: MakeModel) -> None:
    model = make_model("llama")
    keys, values = prefilled(model)
    sizes = {}
    for budget in (10, 20, 40):
        tokens = torch.arange(budget).expand(2, 2, budget)
        cache = EvictedCache(reserve=0)
        cache.add_group(kept(keys, tokens), kept(values, tokens))
        sizes[budget] = cache.nbytes
    # layers x rows x (keys and values) x kv_heads x head_dim x bytes of float32
    assert sizes == {budget: 3 * 2 * 2 * 2 * 16 * 4 * budget for budget in sizes}


def test_more_tokens_than_reserved_are_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    keys, values = prefilled(model)
    cache = EvictedCache(reserve=2)
    cache.add_group(keys, values)
    with pytest.raises(ValueError, match="3 new tokens exceed the 2 reserved"):
        greedy_decode(model, cache, [5], len(PROMPT) - 1, 3, lambda tokens: False)
