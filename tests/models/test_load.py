"""Exporting and loading models: what is refused, and that nothing pickled is ever read."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from pipeline.errors import PipelineError
from pipeline.models.export import export_model
from pipeline.models.load import end_token_ids, head_shape, load_model
from pipeline.models.tokenizer import load_tokenizer
from tests.conftest import SIZES, MakeModel

REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("pipeline", "stages") for path in (REPOSITORY / package).rglob("*.py"))


@pytest.fixture
def model_directory(make_model: MakeModel, tmp_path: Path) -> Path:
    """A tiny Llama with a word tokenizer, as a hub repository would hold it."""
    directory = tmp_path / "source"
    make_model("llama").save_pretrained(directory)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(directory)
    return directory


def test_a_safetensors_directory_is_exported_and_loads(
    model_directory: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    (model_directory / "README.md").write_text("not needed")
    (model_directory / "pytorch_model.bin").write_bytes(b"never read, never copied")
    out = tmp_path / "out"
    export_model(model_directory, out)
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"README.md", "pytorch_model.bin"} & names
    model, expected = load_model(out, "float32", "cpu"), make_model("llama")
    assert not model.training
    assert head_shape(model) == (3, 2, 16)
    assert end_token_ids(model) == {2}
    ids = torch.tensor(load_tokenizer(out)("w5 w9 w77 w12")["input_ids"])[None]
    assert ids.tolist() == [[5, 9, 77, 12]]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_generation_config_without_an_end_leaves_it_to_the_config(model_directory: Path) -> None:
    (model_directory / "generation_config.json").write_text('{"do_sample": true}')
    assert end_token_ids(load_model(model_directory, "float32", "cpu")) == {2}


def test_the_dtype_is_the_one_asked_for(model_directory: Path) -> None:
    assert load_model(model_directory, "bfloat16", "cpu").dtype == torch.bfloat16


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF but not really" * 100)
    with pytest.raises(PipelineError, match=r"model\.gguf cannot be read as a GGUF model") as caught:
        export_model(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(b"")
    with pytest.raises(PipelineError, match=r"neither a \.gguf file nor a model directory"):
        export_model(source, tmp_path / "out")


@pytest.mark.parametrize(
    "files", [(), ("config.json",), ("model.safetensors",), ("config.json", "pytorch_model.bin")], ids="+".join
)
def test_a_directory_that_lacks_config_or_safetensors_is_refused(files: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in files:
        (source / name).write_text("{}")
    with pytest.raises(PipelineError, match=r"source is no model directory: it needs config\.json and \*\.safetensors"):
        export_model(source, tmp_path / "out")


def test_a_missing_model_names_its_directory(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"models/m holds no model; run the model stage"):
        load_model(tmp_path / "models/m", "float32", "cpu")
    with pytest.raises(PipelineError, match=r"models/m holds no readable tokenizer"):
        load_tokenizer(tmp_path / "models/m")


def test_truncated_weights_name_their_directory(model_directory: Path) -> None:
    weights = model_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(PipelineError, match=r"source cannot be loaded as a model") as caught:
        load_model(model_directory, "float32", "cpu")
    assert "\n" not in str(caught.value)


def test_weights_that_lie_only_in_a_pickle_are_not_loaded(model_directory: Path) -> None:
    weights = model_directory / "model.safetensors"
    weights.rename(model_directory / "pytorch_model.bin")
    with pytest.raises(PipelineError, match=r"source cannot be loaded as a model"):
        load_model(model_directory, "float32", "cpu")


def saved(config: PretrainedConfig, directory: Path) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_layers_that_see_the_whole_context_are_enough(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    directory = saved(Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=kinds), tmp_path / "gemma")
    assert head_shape(load_model(directory, "float32", "cpu")) == (1, 2, 16)


UNSUPPORTED = {
    "a window in every layer": (
        MistralConfig(**SIZES, sliding_window=16),
        "has no layer that attends to the whole context",
    ),
    "chunks": (
        Llama4TextConfig(**SIZES, num_local_experts=2, intermediate_size_mlp=32, attention_chunk_size=16),
        "masks its layer 0 in a way that is neither causal nor a window over the last tokens",
    ),
    "a layer of a kind that the family does not have": (
        Qwen2Config(**SIZES, layer_types=["full_attention", "chunked_attention", "full_attention"]),
        "cannot be run with a cache of keys and values alone",
    ),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_eviction_cannot_reproduce_is_refused(what: str, tmp_path: Path) -> None:
    config, message = UNSUPPORTED[what]
    with pytest.raises(PipelineError, match=rf"model {message}.*; choose another model") as caught:
        load_model(saved(config, tmp_path / "model"), "float32", "cpu")
    assert "\n" not in str(caught.value)


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The model with changed weights."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return directory


DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "the prefix of a compiled model": (
        lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()},
        r"does not hold .* and \d+ more, and holds, without use for them, _orig_mod\.",
    ),
    "no output embedding": (
        lambda weights: {name: weight for name, weight in weights.items() if name != "lm_head.weight"},
        r"does not hold lm_head\.weight;",
    ),
    "no MLP in layer 2": (
        lambda weights: {name: weight for name, weight in weights.items() if "layers.2.mlp" not in name},
        r"does not hold model\.layers\.2\.mlp\.down_proj\.weight, ",
    ),
    "a layer too many": (
        lambda weights: weights | {"model.layers.9.mlp.up_proj.weight": torch.zeros(3, 3)},
        r"holds, without use for them, model\.layers\.9\.mlp\.up_proj\.weight;",
    ),
    "another width": (
        lambda weights: weights | {"model.norm.weight": torch.ones(63)},
        r"model\.norm\.weight",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_weights_that_are_not_those_of_the_config_are_refused(what: str, tmp_path: Path) -> None:
    change, message = DAMAGED[what]
    directory = rewritten(saved(LlamaConfig(**SIZES), tmp_path / "m"), change)
    with pytest.raises(PipelineError, match=message) as caught:
        load_model(directory, "float32", "cpu")
    assert "\n" not in str(caught.value)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    directory = saved(LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path / "m")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    one, other = (load_model(directory, "float32", "cpu")(torch.arange(9)[None]).logits for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("place", ["modeling_x.M", "someone/repository--modeling_x.M"])
@pytest.mark.parametrize("kind", ["my_own", "llama"])
def test_code_in_a_model_is_neither_run_nor_asked_about(
    place: str, kind: str, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": place, "AutoModelForCausalLM": place}}
    (model_directory / "config.json").write_text(json.dumps(config))
    (model_directory / "modeling_x.py").write_text("raise SystemExit('this code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    if kind == "llama":  # transformers' own class reads it
        assert type(load_model(model_directory, "float32", "cpu")).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(PipelineError, match="cannot be loaded as a model") as caught:
            load_model(model_directory, "float32", "cpu")
        assert "\n" not in str(caught.value)


UNSAFE_MODULES = {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec"}


def unsafe(source: str) -> list[str]:
    """Imports and calls that read or write pickles, or run text as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [node.module] if node.module.split(".")[0] in UNSAFE_MODULES else []
            found += [name for alias in node.names if (name := f"{node.module}.{alias.name}") in UNSAFE_CALLS]
        elif isinstance(node, ast.Call):
            found += [name for name in (ast.unparse(node.func),) if name in UNSAFE_CALLS]
    return found


def test_the_search_for_pickles_finds_them() -> None:
    assert unsafe("import pickle\ndef f(): torch.load('x')") == ["pickle", "torch.load"]
    assert unsafe("from joblib import load\nfrom torch import save") == ["joblib", "torch.save"]
    assert unsafe("model.eval()") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_module_reads_pickles(path: Path) -> None:
    # What a stage's own process tells its workers of the job; Ray sends everything so. Nothing of a model or of data.
    allowed = {"pickle"} if path == REPOSITORY / "pipeline/executor/on_ray.py" else set()
    assert set(unsafe(path.read_text())) == allowed


def test_every_model_is_loaded_from_safetensors() -> None:
    calls = [
        (path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ForCausalLM.from_pretrained")
    ]
    assert calls
    for path, call in calls:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("use_safetensors") == "True" or "gguf_file" in keywords, path
        assert keywords.get("trust_remote_code") == "False", path
