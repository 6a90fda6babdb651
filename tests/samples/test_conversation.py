"""A dialogue's ids: what a template makes of it where it writes turns once, and always the tokens that were written."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.tokenizer import load_tokenizer
from pipeline.samples.conversation import Conversation
from pipeline.samples.template import chat_prompt
from tests.samples import tokenizers as tiny

# Of those that write an earlier turn as they wrote it when it was the last.
KNOWN = ["CHATML", "SMOLLM3", "LLAMA32", "GEMMA", "MISTRAL"]
TURNS = [("Rain?", "Yes, 4."), ("1000000000 drops?", "More."), ("And snow?", "No.")]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", KNOWN)
def test_its_text_is_the_template_s(name: str, ended: bool) -> None:
    tokenizer = tiny.byte_tokenizer(getattr(tiny, name))
    end = "</s>" if name == "MISTRAL" else "<|eot_id|>" if name == "LLAMA32" else "<|im_end|>"
    conversation = Conversation(tokenizer, {tokenizer.convert_tokens_to_ids(end)})
    gap = " " if name == "MISTRAL" else ""
    messages: list[dict[str, str]] = []
    for question, answer in TURNS:
        conversation.ask(question)
        messages.append({"role": "user", "content": question})
        assert tokenizer.decode(conversation.ids) == chat_prompt(tokenizer, messages)
        # A model that stops by itself writes the end; one that is cut off does not.
        conversation.reply(tokenizer(gap + answer + (end if ended else ""), add_special_tokens=False).input_ids)
        messages.append({"role": "assistant", "content": answer})


def test_a_template_that_rewrites_earlier_turns_does_not_reach_what_was_read() -> None:
    """Qwen 3 leaves the empty thought out of all turns but the last; a cache holds it."""
    tokenizer = tiny.byte_tokenizer(tiny.QWEN3)
    conversation = Conversation(tokenizer, {tokenizer.convert_tokens_to_ids("<|im_end|>")})
    conversation.ask("Rain?")
    read = list(conversation.ids)
    conversation.reply(tokenizer("Yes.<|im_end|>", add_special_tokens=False).input_ids)
    conversation.ask("And snow?")
    assert conversation.ids[: len(read)] == read
    assert tokenizer.decode(conversation.ids[len(read) :]) == (
        "Yes.<|im_end|>\n<|im_start|>user\nAnd snow?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=3), st.text(min_size=1))
def test_what_was_written_stays_as_it_is(replies: list[list[int]], question: str) -> None:
    """Any tokens: halves of characters, and what a tokenizer would cut in another way."""
    if not question.strip() or "\x00" in question or "<" in question:
        return
    tokenizer = tiny.byte_tokenizer(tiny.CHATML, merges=(("a", "a"), ("aa", "a")))
    conversation = Conversation(tokenizer, ())
    for reply in replies:
        conversation.ask(question)
        before = list(conversation.ids)
        conversation.reply(reply)
        assert conversation.ids == [*before, *reply]


def test_a_base_model_writes_a_transcript(base_model: Path) -> None:
    tokenizer = load_tokenizer(base_model)
    conversation = Conversation(tokenizer, {0})
    for question, answer in TURNS:
        conversation.ask(question)
        conversation.reply([*tokenizer(f" {answer}", add_special_tokens=False).input_ids, 0])
    text = "\n\n".join(f"User: {question}\n\nAssistant: {answer}" for question, answer in TURNS)
    assert conversation.ids == tokenizer(text).input_ids
