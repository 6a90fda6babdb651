"""The one schema every benchmark is turned into, and its Parquet file. It knows no benchmark."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.files import atomic_write

Split = Literal["train", "validation", "test"]
Ask = Literal["text", "likelihood", "choice"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ASKS: tuple[Ask, ...] = ("text", "likelihood", "choice")

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("benchmark", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_len", pa.int32()),
        ("question_start", pa.int32()),
        ("answers", pa.list_(pa.string())),
        ("max_new_tokens", pa.int32()),
        ("ask", pa.list_(pa.string())),
        ("enough", pa.list_(pa.list_(pa.string()))),
        ("choices", pa.list_(pa.list_(pa.int32()))),
        ("gold", pa.int32()),
        ("meta", pa.string()),
    ]
)
_OPTIONAL = ("question_start", "gold")


@dataclass(frozen=True)
class Sample:
    """One prompt with its true continuation.

    Attributes
    ----------
    sample_id
        Unique within a model and benchmark.
    benchmark, task, split
        ``task`` is the benchmark's own name where it has no tasks.
    input_ids
        Token ids of prompt and true continuation, special tokens included.
    prompt_len
        Tokens before the continuation, 1 <= prompt_len < len(input_ids).
    question_start
        Where the late question begins: the tokens before it are the compressed context. None where the
        question is part of it.
    answers
        Reference strings, or the choices' texts; empty where only the likelihood of the continuation is asked for.
    max_new_tokens
        How many tokens may be generated; 0 where nothing is.
    ask
        What the sweep does against each evicted cache: write a ``text``, measure the ``likelihood`` of the true
        continuation, choose among ``choices``. Empty where the sample is only learned from.
    enough
        Groups of strings. A text that holds all strings of one group, case ignored, may stop there: its score
        cannot change any more.
    choices, gold
        Token ids of each continuation to choose from, and which of them is right; empty and None where
        nothing is chosen.
    meta
        JSON of whatever the benchmark wants to keep.
    """

    sample_id: str
    benchmark: str
    task: str
    split: Split
    input_ids: tuple[int, ...]
    prompt_len: int
    question_start: int | None = None
    answers: tuple[str, ...] = ()
    max_new_tokens: int = 0
    meta: str = "{}"
    ask: tuple[Ask, ...] = ()
    enough: tuple[tuple[str, ...], ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()
    gold: int | None = None

    @property
    def context_len(self) -> int:
        """Tokens of the compressed context."""
        return self.prompt_len if self.question_start is None else self.question_start

    @property
    def longest_text(self) -> int:
        """Tokens of the prompt with the longest of what may follow it."""
        choices = max(map(len, self.choices), default=0)
        return max(len(self.input_ids), self.prompt_len + max(self.max_new_tokens, choices))


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples as one Parquet file, atomically.

    Raises
    ------
    PipelineError
        There are no samples, two share an id, a continuation is empty or a question lies outside its prompt.
    """
    if not samples:
        raise PipelineError(f"{path}: the benchmark has no samples; check its source and params.yaml (sizes, length).")
    _check(path, samples)
    table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=SCHEMA)
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_samples(path: Path) -> list[Sample]:
    """Read a samples file back; the inverse of :func:`write_samples`.

    Raises
    ------
    PipelineError
        The file cannot be read, or what it holds is none that :func:`write_samples` would have written.
    """
    again = "run the samples stage again"
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise PipelineError(f"{path} cannot be read as samples ({' '.join(str(error).split())}); {again}.") from None
    missing = sorted(set(SCHEMA.names) - set(table.column_names))
    if missing:
        raise PipelineError(f"{path} lacks the columns {', '.join(missing)}; {again}.")
    for field in SCHEMA:
        found = table.schema.field(field.name).type
        if found != field.type:
            raise PipelineError(f"{path}: its column {field.name} is {found}, not {field.type}; {again}.")
    rows = table.select(SCHEMA.names).to_pylist()
    for number, row in enumerate(rows):
        for name, value in row.items():
            if _has_null(value, name in _OPTIONAL):
                raise PipelineError(f"{path}, counted from 0: row {number} has no value in its column {name}; {again}.")
    samples = [Sample(**{name: _as_tuples(value) for name, value in row.items()}) for row in rows]
    _check(path, samples)
    return samples


def _check(path: Path, samples: Sequence[Sample]) -> None:
    """Raise for samples that no stage could use."""
    if len({sample.sample_id for sample in samples}) != len(samples):
        raise PipelineError(f"{path}: two samples share a sample_id; every row of the source needs its own id.")
    for sample in samples:
        name = f"{path}: sample {sample.sample_id}"
        if sample.split not in SPLITS:
            raise PipelineError(f"{name} is of no split ({sample.split}); build the samples again.")
        if not 1 <= sample.prompt_len < len(sample.input_ids):
            raise PipelineError(f"{name} has no tokens after its prompt; drop it or give an answer.")
        if not 1 <= sample.context_len <= sample.prompt_len:
            raise PipelineError(f"{path}: the question of sample {sample.sample_id} starts outside its prompt; fix it.")
        if set(sample.ask) - set(ASKS) or ("choice" in sample.ask) != bool(sample.choices):
            raise PipelineError(f"{name} does not say what is asked of it; build the samples again.")
        if min(min(ids, default=0) for ids in (sample.input_ids, *sample.choices)) < 0:
            raise PipelineError(f"{name} has a negative token id; build the samples again.")
        if not _is_object(sample.meta):
            raise PipelineError(f"{name} has a meta that is no JSON object; build the samples again.")
        if sample.gold is not None and sample.gold < 0:
            raise PipelineError(f"{name} names choice {sample.gold} as right, which is none; build the samples again.")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _has_null(value: Any, optional: bool) -> bool:
    if isinstance(value, list):
        return any(_has_null(item, False) for item in value)
    return value is None and not optional


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
