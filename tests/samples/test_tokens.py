"""Tokens of prompts and continuations, whatever a tokenizer adds, rewrites or joins."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from pipeline.corpora import choice, longbench
from pipeline.errors import PipelineError
from pipeline.models.gguf import sentencepiece_tokenizer
from pipeline.samples.chat import encode, encode_choices, encode_pair, encode_reply, first_token_after
from pipeline.samples.rows import Row
from tests.corpora.test_choice import params, write
from tests.corpora.test_longbench import params as longbench_params
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


def test_a_choice_gets_its_own_tokens_behind_an_appended_end(tmp_path: Path) -> None:
    words = " ".join(f"t{i}" for i in range(30)) + " Question: t5? Answer: no yes"
    model = tiny.save(tiny.word_tokenizer(words, "<s> $A </s>"), tmp_path / "model")
    row = {"question": "t5", "passage": " ".join(f"t{i}" for i in range(6, 26)), "label": 1}
    source = write(tmp_path / "rows.jsonl", [row] * 4)
    for late in (False, True):
        for sample in choice.build(params("boolq", 4, late_question=late), "boolq", source, model)["test"]:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
            assert sample.choices == tuple((tokenizer.convert_tokens_to_ids(word),) for word in ("no", "yes"))
            assert sample.input_ids[: sample.prompt_len][-1] == tokenizer.convert_tokens_to_ids("Answer:")
            assert sample.question_start == (21 if late else None)
    # A vocabulary without the answers cannot choose between them.
    poor = tiny.save(tiny.word_tokenizer("t5 t6", "<s> $A </s>"), tmp_path / "poor")
    with pytest.raises(
        PipelineError, match=r"corpora\.boolq: row \d: the tokenizer gives every choice the same tokens"
    ):
        choice.build(params("boolq", 4), "boolq", source, poor)


def test_a_shortened_prompt_keeps_its_last_token_before_an_appended_end(tmp_path: Path) -> None:
    entry = {"dataset": "lcc", "context": "x" * 400, "input": "", "answers": ["y"], "all_classes": None}
    source = write(tmp_path / "rows.jsonl", [entry])
    prompts = []
    for single in (None, "$A </s>"):
        model = tiny.save(tiny.byte_tokenizer(single=single), tmp_path / f"model{single}")
        (sample,) = longbench.build(longbench_params(("lcc",), length=100), "longbench", source, model)["test"]
        prompts.append(sample.input_ids[: sample.prompt_len])
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 100


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
    tokenizer = sentencepiece_tokenizer(tmp_path / "model.gguf")
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


def test_a_tokenizer_with_other_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    from pipeline.corpora.build import build_samples

    rows: list[Row] = [{"question": "q", "passage": "p", "label": 1}] * 2
    source = write(tmp_path / "rows.jsonl", rows)
    wanted = params("boolq", source={"uri": f"file:{source}", "licence": "mine"})
    for nested, size in ((False, 5), (True, 5), (False, 500), (True, 500)):
        model = tiny.save(tiny.byte_tokenizer(), tmp_path / f"model{nested}{size}")
        config = {"text_config": {"vocab_size": size}} if nested else {"vocab_size": size}
        (model / "config.json").write_text(json.dumps(config))
        if size == 500:
            assert build_samples(wanted, "boolq", model, tmp_path)[0]["test"]
            continue
        with pytest.raises(PipelineError, match=r"its tokenizer gives token \d+ in sample test-0000\d, but vocab_size"):
            build_samples(wanted, "boolq", model, tmp_path)
