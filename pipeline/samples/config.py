"""A model's JSON files, as far as its prompts depend on them. It knows no tokenizer."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError


def read_config(path: Path) -> dict[str, Any]:
    """A model's JSON file; empty where there is none.

    Raises
    ------
    PipelineError
        It is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); fetch the model again.") from None
    if not isinstance(config, dict):
        raise PipelineError(f"{path} is no JSON object; fetch the model again.")
    return config


def language_value(config: dict[str, Any], key: str) -> Any:
    """A value of a model's configuration; a multimodal one keeps those of its language part in ``text_config``."""
    part = config.get("text_config")
    nested = part.get(key) if isinstance(part, dict) else None
    return config[key] if config.get(key) is not None else nested
