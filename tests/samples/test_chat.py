"""Turns as text, and places of characters among tokens."""

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.models.load import load_tokenizer
from pipeline.samples.chat import chat_prompt, encode, encode_reply, end_of_turn, first_token_after


@pytest.mark.parametrize(
    ("character", "token"),
    [(0, 0), (1, 0), (2, 1), (3, 1), (5, 1), (6, 2), (8, 3)],
)
def test_a_token_that_straddles_the_place_is_the_first(character: int, token: int) -> None:
    words = Tokenizer(models.WordLevel({"aa": 0, "b\nc ": 1, "dd": 2}, unk_token="aa"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"aa|b\nc |dd"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert first_token_after(tokenizer, "aab\nc dd", character) == token


def test_tokens_before_the_place_hold_the_text_before_it(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    text = "Rain  falls -- often.\n\n Then: naïve 漢字 🙂 end"
    ids = encode(tokenizer, text)
    for place in (4, 6, 11, 21, 22, 23, 28, 29, len(text)):
        token = first_token_after(tokenizer, text, place)
        assert len(tokenizer.decode(ids[:token])) <= place
        assert len(tokenizer.decode(ids[: token + 1])) > place or token == len(ids)


TURNS = [
    {"role": "user", "content": "Rain?\nToday?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And snow?"},
]


def test_a_base_model_reads_a_transcript(base_model: Path) -> None:
    tokenizer = load_tokenizer(base_model)
    text = "User: Rain?\nToday?\n\nAssistant: Yes.\n\nUser: And snow?\n\nAssistant:"
    assert chat_prompt(tokenizer, TURNS) == text
    assert end_of_turn(base_model, tokenizer) is None
    ids, prompt_len = encode_reply(tokenizer, TURNS, "No.", None)
    assert list(ids) == tokenizer(f"{text} No.").input_ids
    assert tokenizer.decode(ids[:prompt_len]) == f"<|im_start|>{text}"


def test_a_chat_model_reads_its_template(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    prompt = chat_prompt(tokenizer, TURNS)
    assert prompt == tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    end = end_of_turn(smollm2, tokenizer)
    ids, prompt_len = encode_reply(tokenizer, TURNS, "No.", end)
    assert tokenizer.decode(ids[:prompt_len]) == prompt
    assert tokenizer.decode(ids[prompt_len:]) == "No.<|im_end|>"
