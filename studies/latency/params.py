"""The section ``latency`` of studies/params.yaml."""

from typing import Annotated

from pydantic import Field

from pipeline.section import PositiveInt, Section


class StudyLatency(Section):
    """Context lengths at which rankings are timed, and how often each (``studies/latency/measure.py``)."""

    lengths: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)]
    repeats: PositiveInt
