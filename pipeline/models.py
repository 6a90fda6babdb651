"""Turn a model source into a safetensors directory, and load that directory. It knows no attention capture."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipeline.errors import PipelineError
from pipeline.gguf_tokenizer import sentencepiece_tokenizer
from pipeline.layers import full_attention_layers, layer_kinds

WEIGHTS = "*.safetensors"


def export_model(source: Path, out: Path) -> None:
    """Write ``source`` to ``out`` as a Hugging Face directory with safetensors weights.

    A GGUF file is dequantised once, to float32; a safetensors directory is linked or copied file by
    file. Pickled weights are never read.

    Parameters
    ----------
    source
        A ``.gguf`` file, or a directory with ``config.json``, tokenizer files and ``*.safetensors``.
    out
        Directory to create.
    """
    out.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        if not (source / "config.json").is_file() or not list(source.glob(WEIGHTS)):
            raise PipelineError(
                f"{source} is no model directory: it needs config.json and *.safetensors; pickled weights are not read."
            )
        wanted = [*source.glob("*.json"), *source.glob("*.jinja"), *source.glob("*.txt"), *source.glob("*.model")]
        for file in sorted({*wanted, *source.glob(WEIGHTS)}):
            _link_or_copy(file.resolve(), out / file.name)
    elif source.suffix == ".gguf":
        try:
            _quiet()
            rebuilt = sentencepiece_tokenizer(source)
            tokenizer = rebuilt or AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        except Exception as error:  # transformers and gguf raise bare built-in types for unreadable files
            raise PipelineError(
                f"{source} cannot be read as a GGUF model ({_one_line(error)}); fetch it again."
            ) from error
        tokenizer.save_pretrained(out)
        model.save_pretrained(out)
    else:
        raise PipelineError(f"{source} is neither a .gguf file nor a model directory; correct models.*.source.uri.")


def load_model(directory: Path, dtype: str, device: str) -> PreTrainedModel:
    """Load a model directory for inference.

    Raises
    ------
    PipelineError
        The directory is missing or unreadable, or the model computes attention or logits in a way that
        capture and eviction do not reproduce, or none of its layers attends to the whole context.
    """
    if not (directory / "config.json").is_file():
        raise PipelineError(f"{directory} holds no model; run the model stage (dvc repro does) or correct its source.")
    try:
        _quiet()
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
        )
        model = model.to(device)  # type: ignore[arg-type]  # stubs expect the module's own overload
    except Exception as error:  # safetensors, transformers and torch share no base class
        raise PipelineError(
            f"{directory} cannot be loaded as a model ({_one_line(error)}); rebuild or fetch it."
        ) from error
    if unsupported := _unsupported(model):
        raise PipelineError(f"{directory} {unsupported}, which this pipeline cannot evict from; choose another model.")
    model.eval()  # type: ignore[no-untyped-call]
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # see load_model
        raise PipelineError(
            f"{directory} holds no readable tokenizer ({_one_line(error)}); rebuild the model."
        ) from error
    return tokenizer


def end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Token ids that end a generation, from the generation config (the tokenizer's may be wrong after GGUF)."""
    ids: Any = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def head_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of the part of a model's cache that is ranked."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return len(full_attention_layers(config)), config.num_key_value_heads, head_dim


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem
        shutil.copyfile(source, target)


def _unsupported(model: PreTrainedModel) -> str:
    kinds = set(layer_kinds(model.config))
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"has layers of kind {', '.join(sorted(others))}"
    if "full_attention" not in kinds:
        return "has no layer that attends to the whole context"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(model.config, name, None) is not None:
            return f"caps its logits ({name} in config.json)"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "has learned attention sinks"
    return ""


def _quiet() -> None:
    # Stages show their own progress; two bars per loaded tensor would drown it.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
