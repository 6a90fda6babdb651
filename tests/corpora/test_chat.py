"""Places of characters among tokens."""

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.corpora.chat import encode, first_token_after
from pipeline.models import load_tokenizer


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
