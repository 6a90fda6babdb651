"""What the tests of benchmarks share: rows in a file, and a benchmark's samples from them."""

import functools
import json
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.benchmarks.base import BENCHMARKS, Benchmark, Making
from pipeline.benchmarks.base_choice import MultipleChoice, Question
from pipeline.executor.units import Advance, unseen
from pipeline.models.tokenizer import load_tokenizer
from pipeline.samples.rows import Row
from pipeline.samples.sample import Sample, Split

# Loading one takes as long as most tests; whoever changes it loads one of their own.
tokenizer_of = functools.cache(load_tokenizer)
CHOICES = [name for name in BENCHMARKS.names() if issubclass(BENCHMARKS.load(name), MultipleChoice)]


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def into(lines: list[str]) -> Advance:
    """Progress that is written down, a line for each piece."""

    def advance(count: int = 1, status: str = "") -> None:
        lines.extend([status] * count)

    return advance


def build(
    benchmark: Benchmark,
    source: Path,
    model: Path,
    name: str = "name",
    progress: Advance = unseen,
    work: Path = Path("unused"),
    **sources: Path,
) -> dict[Split, list[Sample]]:
    """The samples that ``source``, and ``sources`` by their roles, give."""
    return benchmark.build(Making(name, {"source": source} | sources, model, tokenizer_of(model), work, progress))


def choice(task: str, test: int = 2, **changes: Any) -> MultipleChoice:
    """A benchmark of multiple choice, by the name of its file."""
    section = {"kind": task, "source": "rows", "late_question": False, "sizes": {"test": test}, "seed": 1}
    benchmark = BENCHMARKS.load(task)(**section | changes)
    assert isinstance(benchmark, MultipleChoice)
    return benchmark


def read_pairs(task: str, source: Path) -> list[tuple[Row, Question]]:
    """All rows of a source, and the questions they ask."""
    benchmark = BENCHMARKS.load(task)
    assert issubclass(benchmark, MultipleChoice)
    return list(benchmark.read_rows(source))


def read_questions(task: str, source: Path) -> list[Question]:
    return [question for _, question in read_pairs(task, source)]
