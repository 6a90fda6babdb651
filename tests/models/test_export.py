"""Exporting models: an explicit set of whole files, every weight of the source and no others, never any code.

Mechanisms: the set is made from what transformers reads, not by leaving names out; a file is renamed when it is whole;
of a GGUF file every tensor must be taken, every weight given and every key that describes the computation be read; the
exported configuration names no code, whoever loads it.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pipeline.errors import PipelineError
from pipeline.models import export
from pipeline.models.export import export_model, files_to_export
from pipeline.models.load import load_model
from pipeline.models.tokenizer import load_tokenizer
from tests.conftest import SIZES, MakeModel

SIZE = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def source(make_model: MakeModel, tmp_path: Path) -> Path:
    """A tiny Llama with a word tokenizer, as a hub repository would hold it."""
    directory = tmp_path / "source"
    make_model("llama").save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 126)}
    vocabulary |= {"no": 126, "yes": 127}  # of BoolQ
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(directory)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory, "float32", "cpu")(torch.arange(4, 44)[None]).logits


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# -- which files


def test_what_transformers_does_not_read_stays_behind(source: Path, tmp_path: Path) -> None:
    expected = {file.name for file in source.iterdir()}
    for name in ("consolidated.safetensors", "consolidated.00.safetensors", "pytorch_model.bin", "model.gguf",
                 "modeling_x.py", "pytorch_model.bin.index.json", "consolidated.safetensors.index.json", "README.md",
                 ".tmpAb12cD", "model.safetensors.lock", "training_args.pt", "source.json"):  # fmt: skip
        (source / name).write_text("stray")
    (source / "original").mkdir()
    (source / "original/model.safetensors").write_text("stray")
    export_model(source, tmp_path / "out")
    assert set(content(tmp_path / "out")) == expected


def test_shards_are_those_of_the_index(make_model: MakeModel, source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    make_model("llama").save_pretrained(source, max_shard_size="100KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    (source / "model-00099-of-00099.safetensors").write_text("of an earlier upload")
    export_model(source, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors*")) == sorted(
        [*(file.name for file in shards), "model.safetensors.index.json"]
    )
    expected = make_model("llama")(torch.arange(4, 44)[None]).logits
    assert torch.equal(logits(tmp_path / "out"), expected)
    shards[1].unlink()
    with pytest.raises(PipelineError, match=rf"source lacks {shards[1].name}, which model\.safetensors\.index\.json"):
        export_model(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_one_file_comes_before_an_index_as_transformers_has_it(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "other.safetensors"}}))
    export_model(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "model.safetensors").rename(d / "weights.safetensors"), r"has no model\.safetensors and no .*; "
         r"it has weights\.safetensors: rename it"),
        (lambda d: edit(d / "config.json", transformers_weights="x.safetensors"), r"has no x\.safetensors, from which"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), r"is an adapter .*; merge it into its model"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json is not valid JSON"),
        (lambda d: ((d / "model.safetensors").rename(d / "a.safetensors"),
                    (d / "model.safetensors.index.json").write_text("{}")), r"index\.json has no weight_map"),
    ],
)  # fmt: skip
def test_what_is_no_whole_model_is_one_sentence(
    change: Callable[[Path], Any], message: str, source: Path, tmp_path: Path
) -> None:
    change(source)
    with pytest.raises(PipelineError, match=message) as caught:
        export_model(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# -- interrupted, and nothing of the user's is shared


def test_nothing_of_the_source_is_linked(source: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"  # a hub cache: links to files of other names
    blobs.mkdir()
    for file in list(source.iterdir()):
        shutil.move(file, blobs / f"blob-{file.name}")
        file.symlink_to(blobs / f"blob-{file.name}")
    os.chmod(blobs / "blob-model.safetensors", 0o640)
    export_model(source, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert not file.is_symlink()
        assert file.stat().st_nlink == 1
    assert (blobs / "blob-model.safetensors").stat().st_nlink == 1
    assert (blobs / "blob-model.safetensors").stat().st_mode & 0o777 == 0o640


def test_an_export_continues_after_any_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(source, tmp_path / "whole")
    copies = shutil.copyfile
    for last in range(len(files_to_export(source))):
        out, done = tmp_path / f"out{last}", []

        def stop(original: Path, target: Path, last: int = last, done: list[str] = done) -> None:
            if len(done) == last:
                target.write_bytes(original.read_bytes()[:10])
                raise KeyboardInterrupt
            done.append(target.name)
            copies(original, target)

        monkeypatch.setattr(export.shutil, "copyfile", stop)
        with pytest.raises(KeyboardInterrupt):
            export_model(source, out)
        monkeypatch.setattr(export.shutil, "copyfile", copies)
        before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
        assert sorted(before) == sorted(done)
        export_model(source, out)
        assert content(out) == content(tmp_path / "whole")
        assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
        export_model(source, out)  # and once more, over its own files
        assert content(out) == content(tmp_path / "whole")


# -- code


OWN = {
    "local code": {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"},
    "code of another repository": {"AutoModelForCausalLM": "someone/repo--modeling_x.M"},
}


@pytest.mark.parametrize("what", OWN)
@pytest.mark.parametrize("changes", [{"model_type": "my_own"}, {"architectures": ["MyLlamaForCausalLM"]}])
def test_a_model_with_code_of_its_own_is_refused(
    changes: dict[str, Any], what: str, source: Path, tmp_path: Path
) -> None:
    edit(source / "config.json", auto_map=OWN[what], **changes)
    (source / "modeling_x.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(PipelineError, match=r"config\.json: .* needs code of the model's own repository \(auto_map\)"):
        export_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(source: Path, tmp_path: Path) -> None:
    changes = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.MyTokenizer", None]}}
    edit(source / "tokenizer_config.json", **changes)
    with pytest.raises(PipelineError, match=r"tokenizer_config\.json: MyTokenizer needs code"):
        export_model(source, tmp_path / "out")


def test_code_beside_an_architecture_of_transformers_is_forgotten(source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        edit(source / name, auto_map=OWN["local code"] | {"AutoTokenizer": ["tokenization_x.T", None]})
    (source / "modeling_x.py").write_text("raise SystemExit('code was run')")
    export_model(source, tmp_path / "out")
    assert not [name for name, data in content(tmp_path / "out").items() if b"auto_map" in data]
    assert not list((tmp_path / "out").glob("*.py"))
    transformers.AutoConfig.from_pretrained(tmp_path / "out")  # asks nothing, without an opinion about code
    assert torch.isfinite(logits(tmp_path / "out")).all()
    assert load_tokenizer(tmp_path / "out")("w5 w9")["input_ids"] == [5, 9]


def test_nothing_is_asked_on_a_terminal(source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", model_type="my_own", auto_map=OWN["code of another repository"])
    program = (
        "import sys; from pathlib import Path; from pipeline.models.export import export_model\n"
        f"try: export_model(Path({str(source)!r}), Path({str(tmp_path / 'out')!r}))\n"
        "except Exception as error: print(type(error).__name__)"
    )
    repository = Path(__file__).parents[2]
    parent, child = os.openpty()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, stdin=child, stdout=subprocess.PIPE, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    os.close(parent)
    os.close(child)
    assert done.stdout == "PipelineError\n"


# -- GGUF


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order in which llama.cpp's files hold them."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_llama(
    path: Path, model: transformers.PreTrainedModel, more: dict[str, Any] | None = None, drop: str = "-",
    tensors: dict[str, np.ndarray] | None = None, keys: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a Llama as llama.cpp's converter does: ``more`` tensors, without those whose names begin with ``drop``."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(config.head_dim)
    pieces = ["<pad>", "<s>", "</s>", "a", "b", "ab", "aba", *(chr(0x4E00 + index) for index in range(121))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * 125)
    writer.add_token_merges(["a b", "ab a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        kind = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}[type(value)]
        writer.add_key_value(key, value, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        data = weight.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and data.ndim == 2:
                data = permuted(data, heads)
        target = f"{names.get_name(stem)}.{suffix}"
        if not target.startswith(drop):
            writer.add_tensor(target, data)
    for name, data in (more or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(**changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZE | changes), dtype=torch.float32).eval()


def expect(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(4, 44)[None]).logits


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_gguf_gives_its_model_and_nothing_else(tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    path = write_llama(tmp_path / "m.gguf", model, drop="output.weight" if tied else "-")
    export_model(path, tmp_path / "work/out")
    assert torch.allclose(logits(tmp_path / "work/out"), expect(model), atol=1e-5)
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["out"]
    assert not [name for name in content(tmp_path / "work/out") if name.startswith(".")]
    before = content(tmp_path / "work/out")
    export_model(path, tmp_path / "work/out")
    assert content(tmp_path / "work/out") == before


SPLIT = {"split.no": 0, "split.count": 2}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "part one of two": ({"drop": "blk.2", "keys": SPLIT}, r"is part 1 of 2; merge them with gguf-split --merge"),
    "part two of two": ({"keys": SPLIT | {"split.no": 1}}, r"is part 2 of 2; merge them"),
    "missing block": ({"drop": "blk.2"}, r"does not hold model\.layers\.2\.\S+, .* and \d more"),
    "missing norm": ({"drop": "output_norm"}, r"does not hold model\.norm\.weight;"),
    "bias that nothing takes": (
        {"more": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
        r"holds what transformers does not read from a GGUF file \(blk\.0\.attn_q\.bias\)",
    ),
    "block that nothing takes": (
        {"more": {f"blk.{n}.attn_norm.weight": np.ones(64, np.float32) for n in range(3, 8)}},
        r"\(blk\.3\.attn_norm\.weight, blk\.4\.\S+, blk\.5\.\S+ and 2 more\)",
    ),
    "factors of no scaling": (
        {"more": {"rope_freqs.weight": np.linspace(1, 7, 8, dtype=np.float32)}},
        r"\(rope_freqs\.weight\)",
    ),
    "yarn": (
        {"keys": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
        r"\(llama\.rope\.scaling\.type, llama\.rope\.scaling\.factor\)",
    ),
    "window": ({"keys": {"llama.attention.sliding_window": 16}}, r"\(llama\.attention\.sliding_window\)"),
    "scaled logits": ({"keys": {"llama.logit_scale": 0.5}}, r"\(llama\.logit_scale\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_gguf_that_is_not_all_of_the_model_is_refused(what: str, tmp_path: Path) -> None:
    options, message = REFUSED[what]
    path = write_llama(tmp_path / "m.gguf", llama(), **options)
    with pytest.raises(PipelineError, match=message) as caught:
        export_model(path, tmp_path / "work/out")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not content(tmp_path / "work")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_of_positions_is_taken(factor: float, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    model = llama(rope_parameters=rope, max_position_embeddings=131072)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(factor)
    path = write_llama(tmp_path / "m.gguf", model, more={"rope_freqs.weight": factors})
    assert "rope_freqs.weight" in {tensor.name for tensor in GGUFReader(path).tensors}
    export_model(path, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), expect(model), atol=1e-5)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters == rope


def test_weights_that_lie_beside_a_gguf_do_not_count(source: Path, tmp_path: Path) -> None:
    # A repository with both: the file that was named is the model.
    edit(source / "config.json", num_hidden_layers=1)
    weights = load_file(source / "model.safetensors")
    save_file({name: weight * 0 for name, weight in weights.items()}, source / "model.safetensors")
    model = llama()
    export_model(write_llama(source / "m.gguf", model), tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), expect(model), atol=1e-5)


# -- a full disk


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export.shutil, "copyfile", full)
    with pytest.raises(PipelineError, match=r"No space is left on the disk while writing .*config\.json; free some"):
        export_model(source, tmp_path / "copied")
    assert not content(tmp_path / "copied")

    def full_in_rust(model: transformers.PreTrainedModel, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: Os { code: 28, kind: StorageFull }")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full_in_rust)
    with pytest.raises(PipelineError, match=r"No space is left on the disk while writing .*dequantised; free some"):
        export_model(write_llama(tmp_path / "m.gguf", llama()), tmp_path / "dequantised")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "copied", "m.gguf"}


@pytest.mark.parametrize("architectures", [3, "LlamaForCausalLM", [7]], ids=str)
def test_architectures_that_are_no_names_are_one_sentence(architectures: Any, source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", architectures=architectures)
    with pytest.raises(PipelineError, match=r"config\.json: architectures is no list of names"):
        export_model(source, tmp_path / "out")
