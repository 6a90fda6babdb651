"""Turn a model source into a safetensors directory. It runs no model and knows no attention.

What is exported is an explicit set of files: the configuration, the tokenizer and the weights that transformers
reads. Nothing else of a source gets into an output, no code, and nothing of the user's is linked.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.errors import PipelineError, one_line
from pipeline.files import atomic_write, disk_errors, remove, temporary_name, write_json
from pipeline.models.gguf import sentencepiece_tokenizer
from pipeline.models.load import quiet, require_weights, some

_loader: Any = modeling_gguf_pytorch_utils  # untyped

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SOURCE_FILE = "source.json"

# Read by transformers beside the weights: configurations and tokenizers.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
# Where transformers looks for the names of code in the same repository or another one.
_NAMES_CODE = ("config.json", "tokenizer_config.json")
# Of a GGUF file's description of the model, besides what transformers reads: no number depends on these.
_HARMLESS_KEYS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
# What conversion to GGUF takes for Llama 3's scaling of positions where a configuration does not say otherwise.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def export_model(source: Path, out: Path, finished: Callable[[str], None] = lambda _: None) -> None:
    """Write ``source`` to ``out`` as a Hugging Face directory with safetensors weights.

    A GGUF file is dequantised once, to float32; a safetensors directory is copied file by file. Pickled weights are
    never read, and code is neither copied nor run. A file is under its name only when it is whole, so an export that
    was interrupted continues when it is called again with the same source.

    Parameters
    ----------
    source
        A ``.gguf`` file, or a directory with ``config.json``, tokenizer files and ``model.safetensors`` or its shards.
    out
        Directory to create.
    finished
        Called with the name of each file of :func:`files_to_export` that is done.

    Raises
    ------
    PipelineError
        The source is no model, needs code of its own, lacks weights or has some that nothing would use.
    """
    files = files_to_export(source)
    if source.is_dir():
        for file in files:
            _copy(file, out / file.name)
            finished(file.name)
    elif not (out / "config.json").is_file():  # else it is whole
        # Libraries write several files, and files of theirs meanwhile: their folder becomes the output as a whole.
        temporary = temporary_name(out)
        try:
            with disk_errors(out):
                _export_gguf(source, temporary)
                os.replace(temporary, out)
        finally:
            remove(temporary)
    if source.is_file():
        finished(source.name)


def files_to_export(source: Path) -> list[Path]:
    """The files of a source that make up the model: those that are copied, or the GGUF file itself.

    Raises
    ------
    PipelineError
        As for :func:`export_model`, as far as it can be told without reading the weights.
    """
    if not source.is_dir():
        if source.suffix != ".gguf":
            raise PipelineError(f"{source} is neither a .gguf file nor a model directory; correct models.*.source.uri.")
        return [source]
    if not (source / "config.json").is_file() or not list(source.glob("*.safetensors")):
        raise PipelineError(
            f"{source} is no model directory: it needs config.json and *.safetensors; pickled weights are not read."
        )
    if (source / "adapter_config.json").is_file():
        raise PipelineError(f"{source} is an adapter (adapter_config.json); merge it into its model and save that.")
    config = _read_json(source / "config.json")
    _refuse_own_code(source, config)
    weights = _weights(source, config)
    small = {
        file
        for pattern in _SMALL_FILES
        for file in source.glob(pattern)
        # Indices of weights that are not taken; and our own record, if the source was exported by this project.
        if file.is_file() and not file.name.endswith(".index.json") and file.name != SOURCE_FILE
    }
    return sorted(small | set(weights))


def _weights(source: Path, config: dict[str, Any]) -> list[Path]:
    """The files that transformers takes the weights from: one, or an index and the shards that it names."""
    named = config.get("transformers_weights")
    first = next((name for name in (named, WEIGHTS, INDEX) if name and (source / name).is_file()), None)
    if first is None or (named and first != named):
        others = ", ".join(sorted(file.name for file in source.glob("*.safetensors")))
        raise PipelineError(
            f"{source} has no {named or f'{WEIGHTS} and no {INDEX}'}, from which transformers reads the weights; "
            f"it has {others}: rename it or save the model again."
        )
    if not first.endswith(".index.json"):
        return [source / first]
    try:
        shards = sorted(set(_read_json(source / first)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError):
        raise PipelineError(f"{source / first} has no weight_map; fetch it again.") from None
    if missing := [name for name in shards if Path(name).name != name or not (source / name).is_file()]:
        raise PipelineError(
            f"{source} lacks {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}, which {first} names; "
            "fetch the model again, whole."
        )
    return [source / first, *(source / name for name in shards)]


def _refuse_own_code(source: Path, config: dict[str, Any]) -> None:
    """Raise where a model or its tokenizer is computed by code of its repository, which is never run."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise PipelineError(f"{source / 'config.json'}: architectures is no list of names; fetch the model again.")
    named = [config.get("model_type"), *architectures]
    ours = config.get("model_type") in CONFIG_MAPPING and all(hasattr(transformers, name) for name in named[1:])
    if "auto_map" in config and not ours:
        _refuse_code(source / "config.json", ", ".join(str(name) for name in named if name))
    path = source / "tokenizer_config.json"
    tokenizer = _read_json(path) if path.is_file() else {}
    kind = tokenizer.get("tokenizer_class")
    if "auto_map" in tokenizer and kind and not (hasattr(transformers, kind) or hasattr(transformers, f"{kind}Fast")):
        _refuse_code(path, kind)


def _refuse_code(path: Path, what: str) -> None:
    raise PipelineError(
        f"{path}: {what} needs code of the model's own repository (auto_map), which is never run; "
        "take a model that transformers itself can compute."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
    except ValueError as error:
        raise PipelineError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    return content


def _copy(source: Path, target: Path) -> None:
    """Copy a file whole or not at all; what is there in its size was copied before."""
    if target.name in _NAMES_CODE and "auto_map" in (content := _read_json(source)):
        # Whoever loads the copy must not be asked about code.
        write_json(target, {key: value for key, value in content.items() if key != "auto_map"})
    elif not target.is_file() or target.stat().st_size != source.stat().st_size:
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def _export_gguf(source: Path, out: Path) -> None:
    try:
        quiet()
        with _read_once():
            reader = gguf.GGUFReader(str(source))
            _refuse_part(source, reader)
            rebuilt = sentencepiece_tokenizer(reader)
            tokenizer = rebuilt or AutoTokenizer.from_pretrained(
                source.parent, gguf_file=source.name, trust_remote_code=False
            )
            found: Any = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model: PreTrainedModel = found[0]
            unused = _unused(reader, model)
    except PipelineError:
        raise
    except Exception as error:  # transformers and gguf raise bare built-in types for unreadable files
        raise PipelineError(f"{source} cannot be read as a GGUF model ({one_line(error)}); fetch it again.") from error
    require_weights(source, found[1])
    if "rope_freqs.weight" in unused and _take_llama3_rope(reader, model):
        unused.remove("rope_freqs.weight")
    if unused := [*unused, *_unread_keys(reader, model)]:
        raise PipelineError(
            f"{source} holds what transformers does not read from a GGUF file ({some(unused)}), so that its numbers "
            "would be others; take the model as safetensors."
        )
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


@contextmanager
def _read_once() -> Iterator[None]:
    """Keep what transformers reads of a GGUF file several times over, which is most of the time of an export.

    It opens the file anew for the configuration, the tokenizer and the weights, a second for each 15,000 words of the
    vocabulary, and lists the names of tensors anew for every module of the model.
    """
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in kept.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in kept.items():
            setattr(gguf, name, function)


def _refuse_part(source: Path, reader: Any) -> None:
    count = reader.get_field("split.count")
    if count is not None and (parts := int(count.contents())) > 1:
        part = int(reader.get_field("split.no").contents()) + 1
        raise PipelineError(
            f"{source} is part {part} of {parts}; merge them with gguf-split --merge and name the merged file."
        )


def _unused(reader: Any, model: PreTrainedModel) -> list[str]:
    """Tensors of a GGUF file that transformers gives to no weight of the model."""
    architecture = reader.get_field("general.architecture").contents()
    processor = _loader.TENSOR_PROCESSORS.get(architecture, _loader.TensorProcessor)(config=model.config.to_dict())
    taken = set(_loader.get_gguf_hf_weights_map(model, processor))
    if architecture == "gpt2":
        taken.add("output.weight")  # which its processor takes by itself
    # Experts are one parameter, which has no suffix.
    return [t.name for t in reader.tensors if not taken & {t.name, t.name.removesuffix(".weight")}]


def _unread_keys(reader: Any, model: PreTrainedModel) -> list[str]:
    """Keys of a GGUF file that describe the computation and that transformers does not read."""
    architecture = reader.get_field("general.architecture").contents()
    known: dict[str, Any] = _loader.GGUF_TO_TRANSFORMERS_MAPPING["config"]
    read = known.get(architecture, known.get(model.config.model_type, {}))
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    as_they_are = {
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.attn_factor": 1.0,
        "attention.causal": True,
    }
    unread = []
    for name, field in reader.fields.items():
        key = name.removeprefix(f"{architecture}.")
        if key == name or key in _HARMLESS_KEYS or read.get(key) is not None:
            continue
        if key not in as_they_are or field.contents() != as_they_are[key]:
            unread.append(name)
    return unread


def _take_llama3_rope(reader: Any, model: PreTrainedModel) -> bool:
    """Set Llama 3's scaling of positions where a GGUF file's factors are exactly its; returns whether they are."""
    stored = next(np.asarray(t.data, np.float32) for t in reader.tensors if t.name == "rope_freqs.weight")
    before = dict(model.config.rope_parameters)
    plain = 1.0 / before["rope_theta"] ** (torch.arange(0, 2 * len(stored), 2, dtype=torch.float32) / (2 * len(stored)))
    model.config.rope_parameters = before | {"rope_type": "llama3", "factor": float(stored.max())} | _LLAMA3
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    if len(scaled) == len(plain) and torch.allclose(plain / scaled, torch.from_numpy(stored.copy()), rtol=1e-4):
        return True
    model.config.rope_parameters = before
    return False
