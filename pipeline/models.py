"""Turn a model source into a safetensors directory, and load that directory. It knows no attention capture."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipeline.errors import PipelineError, one_line
from pipeline.gguf_tokenizer import sentencepiece_tokenizer
from pipeline.layout import cache_layout

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
            quiet()
            rebuilt = sentencepiece_tokenizer(source)
            tokenizer = rebuilt or AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            model = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # transformers and gguf raise bare built-in types for unreadable files
            raise PipelineError(
                f"{source} cannot be read as a GGUF model ({one_line(error)}); fetch it again."
            ) from error
        tokenizer.save_pretrained(out)
        model.save_pretrained(out)
    else:
        raise PipelineError(f"{source} is neither a .gguf file nor a model directory; correct models.*.source.uri.")


def load_model(directory: Path, dtype: str, device: str) -> PreTrainedModel:
    """Load a model directory for inference; code in it is never run.

    Raises
    ------
    PipelineError
        The directory is missing or unreadable, its weights are not those of its config, or the model's cache cannot
        be ranked (:func:`pipeline.layout.cache_layout`).
    """
    if not (directory / "config.json").is_file():
        raise PipelineError(f"{directory} holds no model; run the model stage (dvc repro does) or correct its source.")
    try:
        quiet()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # only to name them: they are refused below
        )
        model: PreTrainedModel = loaded[0].to(device)
    except Exception as error:  # safetensors, transformers and torch share no base class
        raise PipelineError(
            f"{directory} cannot be loaded as a model ({one_line(error)}); rebuild or fetch it."
        ) from error
    require_weights(directory, loaded[1])
    model.eval()  # type: ignore[no-untyped-call]
    cache_layout(model)
    return model


def require_weights(source: Path, report: Mapping[str, Any]) -> None:
    """Refuse a model that transformers has filled with random numbers, or that left weights of its files unused.

    Parameters
    ----------
    report
        What ``from_pretrained(..., output_loading_info=True)`` says; weights tied to others do not count as missing.

    Raises
    ------
    PipelineError
        Names some of the weights.
    """
    problems = []
    for kind, words in (
        ("missing_keys", "does not hold"),
        ("mismatched_keys", "holds in another shape"),
        ("unexpected_keys", "holds, without use for them,"),
    ):
        if names := sorted(key if isinstance(key, str) else key[0] for key in report.get(kind) or ()):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{words} {', '.join(names[:3])}{more}")
    if problems:
        raise PipelineError(
            f"{source}: the weights are not those of its config.json: it {', and '.join(problems)}; convert or fetch "
            "the model again."
        )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # see load_model
        raise PipelineError(
            f"{directory} holds no readable tokenizer ({one_line(error)}); rebuild the model."
        ) from error
    return tokenizer


def end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Token ids that end a generation, from the generation config (the tokenizer's may be wrong after GGUF)."""
    stated = model.generation_config or model.config.get_text_config(decoder=True)
    ids: Any = stated.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def head_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of the part of a model's cache that is ranked."""
    layout = cache_layout(model)
    return len(layout.ranked), layout.kv_heads, layout.head_dim


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem
        shutil.copyfile(source, target)


def quiet() -> None:
    """Silence transformers' own bars and warnings."""
    # Stages show their own progress; two bars per loaded tensor would drown it.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
