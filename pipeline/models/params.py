"""The section of one language model in params.yaml."""

from pathlib import Path
from typing import Literal

from pipeline.section import PARAMS, Name, Section, find, parse, validate

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelParams(Section):
    """One language model: its entry of ``sources``, and the dtype that it is run in.

    ``stands_in_for`` is printed wherever its numbers appear.
    """

    source: Name
    dtype: Dtype
    stands_in_for: str | None = None


def read_dtype(model: str, path: Path = PARAMS) -> str:
    """``models.<model>.dtype`` of a params file."""
    key = f"models.{model}.dtype"
    found: str = validate(find(parse(path), key, path), Dtype, key, path)  # type: ignore[arg-type]
    return found
