"""Tokenizers rebuilt from GGUF: against SentencePiece's algorithm in plain Python, and with their model."""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import gguf
import pytest
import torch
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.models.export import export_model
from pipeline.models.gguf import sentencepiece_tokenizer
from pipeline.models.load import load_model
from pipeline.models.tokenizer import load_tokenizer
from pipeline.params import Params
from pipeline.sources.fetch import fetch

REPOSITORY = Path(__file__).parents[2]


def reference(text: str, pieces: Mapping[str, int], scores: Mapping[str, float], whole: Sequence[str]) -> list[int]:
    """Token ids as SentencePiece's BPE gives them, slowly.

    pieces: piece -> id of all pieces; scores: of those that may be merged; whole: cut out before merging.
    """
    symbols: list[tuple[str, bool]] = []  # and whether it may be merged
    position = 0
    while position < len(text):
        found = max((piece for piece in whole if text.startswith(piece, position)), key=len, default=None)
        symbols.append((found, False) if found else (text[position].replace(" ", "▁"), True))
        position += len(symbols[-1][0])
    while True:
        best = None
        for index, ((left, one), (right, other)) in enumerate(itertools.pairwise(symbols)):
            score = scores.get(left + right) if one and other else None
            if score is not None and (best is None or score > best[0]):
                best = (score, index)
        if best is None:
            break
        index = best[1]
        symbols[index : index + 2] = [(symbols[index][0] + symbols[index + 1][0], True)]
    ids = []
    for piece, _ in symbols:
        ids += [pieces[piece]] if piece in pieces else [pieces[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids


# -- a small vocabulary with everything that a SentencePiece vocabulary may hold

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
WHOLE = ["\n", "\n\n", "  ", "   ", "<b>", "</b>"]
LETTERS = "▁abcdé"


def random_pieces(seed: int) -> list[str]:
    """Pieces that merges can reach, most important first: unions of two earlier ones."""
    generator, found = random.Random(seed), list(LETTERS)
    while len(found) < 120:
        union = generator.choice(found) + generator.choice(found)
        if len(union) <= 6 and union not in found:
            found.append(union)
    merged = found[len(LETTERS) :]
    generator.shuffle(merged)
    return merged + list(LETTERS)


def write_gguf(path: Path, seed: int, kind: str = "llama", space_prefix: bool = False) -> dict[str, float]:
    """Write a GGUF file without tensors; returns the scores of the pieces that may be merged."""
    normal = {piece: -float(rank) for rank, piece in enumerate(random_pieces(seed))}
    groups = [
        (SPECIAL, TokenType.CONTROL),
        ([f"<0x{byte:02X}>" for byte in range(256)], TokenType.BYTE),
        (WHOLE, TokenType.USER_DEFINED),
        (list(normal), TokenType.NORMAL),
    ]
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model(kind)
    writer.add_token_list([piece for pieces, _ in groups for piece in pieces])
    writer.add_token_scores([normal.get(piece, -1000.0) for pieces, _ in groups for piece in pieces])
    writer.add_token_types([token_type for pieces, token_type in groups for _ in pieces])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(space_prefix)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return normal


def rebuilt(path: Path) -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_tokenizer(gguf.GGUFReader(path))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[PreTrainedTokenizerFast, dict[str, float]]]:
    """Tokenizers of three random vocabularies and the scores of their pieces."""
    directory = tmp_path_factory.mktemp("gguf")
    scores = {seed: write_gguf(directory / f"{seed}.gguf", seed) for seed in range(3)}
    return [(rebuilt(directory / f"{seed}.gguf"), scores[seed]) for seed in scores]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([*"abcdé", " ", "ab", "  ", "\n", "\n\n", "<b>", "</b>", "<", "漢", "😀"]), max_size=40
    ),
    seed=st.integers(0, 2),
)
def test_small_vocabularies_split_as_sentencepiece_does(
    parts: list[str], seed: int, small: list[tuple[PreTrainedTokenizerFast, dict[str, float]]]
) -> None:
    tokenizer, scores = small[seed]
    text = "".join(parts)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == reference(text, tokenizer.get_vocab(), scores, WHOLE)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_and_template_are_the_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", 0)
    rebuilt(tmp_path / "m.gguf").save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer.chat_template == "{{ messages }}"
    plain = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert tokenizer("ab")["input_ids"] == [2, *plain]
    assert tokenizer.decode([2, *plain, 1], skip_special_tokens=True) == "ab"


def test_a_space_goes_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    scores = write_gguf(tmp_path / "m.gguf", 1, space_prefix=True)
    tokenizer = rebuilt(tmp_path / "m.gguf")
    ids = tokenizer("abcd ab", add_special_tokens=False)["input_ids"]
    assert ids == reference(" abcd ab", tokenizer.get_vocab(), scores, ())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "abcd ab"


def test_other_vocabularies_are_left_to_transformers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", 0, kind="gpt2")
    assert sentencepiece_tokenizer(gguf.GGUFReader(tmp_path / "m.gguf")) is None


# -- Gemma 3, whose vocabulary this is for

PARAGRAPH = (
    "The sun is the star at the centre of the solar system. It is a large, hot ball of gas that gives off light and "
    "heat, and without it there would be no life on earth. The earth goes around the sun once a year, and the moon "
    "goes around the earth once a month. There are eight planets in the solar system. The largest is Jupiter, and the "
    "smallest is Mercury, which is also the closest planet to the sun."
)


@pytest.fixture(scope="module")
def gemma_file(default_params: Params) -> Path:
    return fetch(default_params.model_sources("gemma3-270m")["source"], REPOSITORY / ".cache/sources")


@pytest.fixture(scope="module")
def gemma_reader(gemma_file: Path) -> gguf.GGUFReader:
    """Opening it takes 10 s."""
    return gguf.GGUFReader(gemma_file)


@pytest.fixture(scope="module")
def gemma(
    gemma_file: Path, gemma_reader: gguf.GGUFReader, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model and tokenizer as the model stage writes them and the other stages load them."""
    out = tmp_path_factory.mktemp("gemma")
    opened: list[Path] = []

    def read(path: str | Path) -> gguf.GGUFReader:
        opened.append(Path(path))
        return gemma_reader

    with patch.object(gguf, "GGUFReader", read):
        export_model(gemma_file, out)
    assert set(opened) == {gemma_file}
    return load_model(out, "float32", "cpu"), load_tokenizer(out)


def perplexity(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """Of all tokens but the first."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss.exp())


@pytest.mark.slow
def test_gemma_reads_plain_english(gemma: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = gemma
    ids = tokenizer(PARAGRAPH)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(PARAGRAPH.split()) < len(ids) < 1.3 * len(PARAGRAPH.split())
    assert perplexity(model, ids) < 6


@pytest.mark.slow
def test_gemma_texts_come_back(gemma: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = gemma
    for text in (
        PARAGRAPH,
        "def f(x):\n\treturn  {'a': [1, 2.5]}  # 100%\n\n\n",
        "  two spaces, <table><tr><td>cells</td></tr></table>, Ünïcödé, 漢字, עברית, 👩‍🚀 and \x07\u2028",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.slow
def test_gemma_splits_random_text_as_sentencepiece_does(
    gemma_reader: gguf.GGUFReader, gemma: tuple[PreTrainedModel, PreTrainedTokenizerFast]
) -> None:
    _, tokenizer = gemma
    fields = gemma_reader.fields
    pieces, values, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    scores = {p: value for p, value, kind in zip(pieces, values, types, strict=True) if kind == TokenType.NORMAL}
    whole = [piece for piece, kind in zip(pieces, types, strict=True) if kind == TokenType.USER_DEFINED]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    generator = random.Random(0)
    words = [piece.replace("▁", " ") for piece in generator.sample(sorted(scores), 2000)]
    alphabets = (PARAGRAPH.split(" "), [*"etaoins  "], words, [*"abAB12 .,\n\t<>/é漢😀"], [*whole, *"ab "])
    for number in range(500):
        text = "".join(generator.choices(alphabets[number % len(alphabets)], k=generator.randint(1, 25)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference(text, vocabulary, scores, whole), text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
