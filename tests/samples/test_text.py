"""Tokens of prompts and continuations, whatever a tokenizer adds, rewrites or joins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import PipelineError
from pipeline.models.gguf import sentencepiece_tokenizer
from pipeline.models.tokenizer import load_tokenizer
from pipeline.samples.template import encode_reply
from pipeline.samples.text import encode, encode_choices, encode_pair, first_token_after
from tests.samples import tokenizers as tiny

AROUND = {"nothing": None, "in front": "<s> $A", "behind": "$A </s>", "both": "<s> $A </s>", "two": "<s> $A </s> </s>"}


@pytest.mark.parametrize("name", AROUND)
def test_no_token_stands_between_prompt_and_answer(name: str) -> None:
    tokenizer = tiny.word_tokenizer("a b c", AROUND[name])
    a, b, c = (tokenizer.convert_tokens_to_ids(word) for word in "abc")
    front = [tokenizer.bos_token_id] if name in ("in front", "both", "two") else []
    assert encode(tokenizer, "a b") == [*front, a, b]
    assert encode_pair(tokenizer, "a b", " c", None) == ((*front, a, b, c), len(front) + 2)
    assert encode_pair(tokenizer, "a b", " c", 7) == ((*front, a, b, c, 7), len(front) + 2)
    assert first_token_after(tokenizer, "a b c", 3) == len(front) + 2
    assert first_token_after(tokenizer, "a b c", 5) == len(front) + 3
    assert encode_choices(tokenizer, "a", ["b", "c c"], "row 0") == ([*front, a], ((b,), (c, c)))


@settings(deadline=None, max_examples=60)
@given(prompt=st.text(max_size=20), answer=st.text(min_size=1, max_size=20), name=st.sampled_from(sorted(AROUND)))
def test_bytes_are_what_the_text_is(prompt: str, answer: str, name: str) -> None:
    tokenizer = tiny.byte_tokenizer(single=AROUND[name], merges=(("a", "b"), ("Ġ", "a"), ("Ċ", "Ċ")))
    ids, prompt_len = encode_pair(tokenizer, prompt, answer, None)
    front = "<s>" if name in ("in front", "both", "two") else ""
    assert tokenizer.decode(ids) == f"{front}{prompt}{answer}"
    assert tokenizer.decode(ids[:prompt_len]) == f"{front}{prompt}"


def test_a_template_s_own_first_token_is_not_doubled() -> None:
    tokenizer = tiny.byte_tokenizer(tiny.LLAMA32, single="<s> $A </s>")
    ids, prompt_len = encode_reply(tokenizer, [{"role": "user", "content": "Rain?"}], "No.", None)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[prompt_len:]) == "No."


def test_an_end_that_a_gguf_file_asks_for_is_not_between(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * 5]
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-1.0 * index for index in range(len(pieces))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_tensor("t", np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = sentencepiece_tokenizer(GGUFReader(tmp_path / "model.gguf"))
    assert tokenizer is not None
    a, b = pieces.index("▁a"), pieces.index("▁b")
    assert tokenizer("a").input_ids == [1, a, 2], "the file's flags must show"
    assert encode_pair(tokenizer, "a", " b", None) == ((1, a, b), 2)


PIECES = ("▁", ".", "a", "b", "▁a", "▁b", "ab", "▁ab")


def test_an_answer_apart_gets_no_space_that_is_not_there() -> None:
    tokenizer = tiny.piece_tokenizer(PIECES, (("a", "b"), ("▁", "ab"), ("▁", "a"), ("▁", "b")))
    # "ab" would be one token; alone, "b" would be " b".
    ids, prompt_len = encode_pair(tokenizer, "a", "b", None)
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["▁a", "b"]
    assert prompt_len == 1
    ids, _ = encode_pair(tokenizer, "a", " b", None)
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["▁a", "▁b"]


def test_rewritten_texts_are_cut_where_they_should_be_or_not_at_all() -> None:
    lower = tiny.byte_tokenizer(normalizer=normalizers.Lowercase())
    assert first_token_after(lower, "Rain FALLS", 5) == 5
    # NFKC makes three letters of one: characters of the text are not those of the tokens.
    wide = tiny.byte_tokenizer(normalizer=normalizers.NFKC())
    assert wide.decode(encode(wide, "\N{SQUARE KG}x")[: first_token_after(wide, "\N{SQUARE KG}x", 1)]) == "kg"
    stripped = tiny.byte_tokenizer(normalizer=normalizers.Strip())
    assert stripped.decode(encode(stripped, "  ab cd")[: first_token_after(stripped, "  ab cd", 5)]) == "ab "


class Shifted:
    """A tokenizer that counts its characters from 1."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        encoding = self.tokenizer(text, **options)
        if "offset_mapping" in encoding:
            encoding["offset_mapping"] = [(start + 1, end + 1) for start, end in encoding["offset_mapping"]]
        return encoding


class Silent(Shifted):
    """A tokenizer that does not know."""

    def __call__(self, text: str, **options: Any) -> Any:
        if options.get("return_offsets_mapping"):
            raise NotImplementedError
        return self.tokenizer(text, **options)


def test_wrong_places_are_refused() -> None:
    with pytest.raises(PipelineError, match="says wrongly where its tokens begin"):
        first_token_after(Shifted(tiny.byte_tokenizer()), "abcdef", 3)
    with pytest.raises(PipelineError, match="does not say where its tokens begin"):
        first_token_after(Silent(tiny.byte_tokenizer()), "abcdef", 3)


@pytest.mark.parametrize(
    ("context", "choices", "message"),
    [
        ("a", ["b", ""], "row 3 has a choice without tokens of its own"),
        ("a", ["b", " "], "row 3 has a choice without tokens of its own"),
        ("a", ["b", "b"], "row 3: the tokenizer gives every choice the same tokens"),
    ],
)
def test_choices_without_tokens_of_their_own(context: str, choices: list[str], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        encode_choices(tiny.byte_tokenizer(), context, choices, "row 3")


def test_a_choice_that_is_joined_to_its_context_is_refused() -> None:
    tokenizer = tiny.byte_tokenizer(merges=(("a", "Ġ"), ("aĠ", "b")))
    with pytest.raises(PipelineError, match="row 3: the tokenizer joins the end of the context with a choice"):
        encode_choices(tokenizer, "a", ["bc", "cd"], "row 3")


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
