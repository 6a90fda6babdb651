"""The section of one language model in params.yaml."""

from pathlib import Path
from typing import Literal

from pipeline.section import PARAMS, Name, Section, read

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
    found: str = read(f"models.{model}.dtype", Dtype, path)  # type: ignore[arg-type]
    return found
