"""Load an exported model. It knows no attention capture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.errors import PipelineError, one_line
from pipeline.models.layout import cache_layout


def load_model(directory: Path, dtype: str, device: str) -> PreTrainedModel:
    """Load a model directory for inference; code in it is never run.

    Raises
    ------
    PipelineError
        The directory is missing or unreadable, its weights are not those of its config, or the model's cache cannot
        be ranked (:func:`pipeline.models.layout.cache_layout`).
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

    ``report`` is what ``from_pretrained(..., output_loading_info=True)`` says; weights tied to others do not count as
    missing.

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
            problems.append(f"{words} {some(names)}")
    if problems:
        raise PipelineError(
            f"{source}: the weights are not those of its config.json: it {', and '.join(problems)}; convert or fetch "
            "the model again."
        )


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Token ids that end a generation, from the generation config (the tokenizer's may be wrong after GGUF)."""
    ids: Any = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        ids = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def head_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of the part of a model's cache that is ranked."""
    layout = cache_layout(model)
    return len(layout.ranked), layout.kv_heads, layout.head_dim


def quiet() -> None:
    """Silence transformers' own bars and warnings."""
    # Stages show their own progress; two bars per loaded tensor would drown it.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
