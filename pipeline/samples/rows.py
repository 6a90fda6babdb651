"""Rows of a published data set, JSON lines or Parquet, and what other tools may have made of their values.

Readers declare the columns they use as a :class:`RowModel`; whatever pandas, spreadsheets, databases or shell tools
turn a value into is either read as what it was or refused here, in one place. It knows no data set.

=============================  =======================================================================
in the file                    read as
=============================  =======================================================================
null, NaN, no such key         the same: there is no value
``1.0``, ``"1"``, ``"1.0"``    the whole number 1, where a number is expected (:data:`WholeNumber`)
0, 1, ``"true"``, ``"False"``  true or false, where that is expected (:data:`Flag`)
anything else                  refused with the file, the line or row, the column and the value
=============================  =======================================================================
"""

import gzip
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from pipeline.errors import PipelineError

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
_FLAGS = {"true": True, "false": False}


def read_rows(file: Path | zipfile.Path) -> list[Row]:
    """All rows of a ``.parquet``, ``.jsonl`` or ``.jsonl.gz`` file, which may lie inside a zip archive.

    Raises
    ------
    PipelineError
        The file cannot be read, or a line is no JSON object.
    """
    return [row for _, row in read_placed_rows(file)]


def read_placed_rows(file: Path | zipfile.Path) -> list[tuple[str, Row]]:
    """As :func:`read_rows`, each row with where it stands: ``FILE, line 3`` (the first is 1) of JSON lines.

    A Parquet file has no lines; ``FILE, counted from 0`` goes before a row's number there.
    """
    try:
        if isinstance(file, Path) and file.suffix == ".parquet":
            return [(f"{file}, counted from 0", row) for row in _parquet_rows(file)]
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return list(_json_rows(file, decoded(content)))
    # RuntimeError: an encrypted archive, or lists nested deeper than Python recurses.
    except (
        OSError, EOFError, ValueError, ArithmeticError, RuntimeError, pa.ArrowException, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise PipelineError(
            f"{file} cannot be read as rows ({reason}); give .jsonl, .jsonl.gz or .parquet, as it was published."
        ) from None


def decoded(content: bytes) -> str:
    """The text of a JSON file: UTF-8, or UTF-16 or UTF-32 as Windows tools write it, with or without their mark.

    Raises
    ------
    ValueError
        It is none of these.
    """
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is no text in {error.encoding.upper()}, save the file as UTF-8") from None


def parsed(text: str) -> Any:
    """The value of a JSON text, in which no object names a key twice.

    Raises
    ------
    ValueError
        It is not valid JSON, or a key is there twice: which of two values was meant cannot be known.
    """
    return json.loads(text, object_pairs_hook=_distinct)


def require_columns(rows: Iterable[Row], columns: Iterable[str], source: Path, schema: str) -> None:
    """Refuse rows that lack a column; ``schema`` names what they should follow."""
    missing = [column for column in columns if not all(column in row for row in rows)]
    if missing:
        raise PipelineError(f"{source}: some rows lack {', '.join(missing)}; the source must follow {schema}.")


def is_null(value: Any) -> bool:
    """Whether there is no value: null, or the NaN that tools write in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


class RowModel(BaseModel):
    """The columns of a data set that are used. Strict: a value of another type is refused, not converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _null_is_missing(cls, row: Any) -> Any:
        return {name: value for name, value in row.items() if not is_null(value)} if isinstance(row, dict) else row


Model = TypeVar("Model", bound=RowModel)


def validated(
    model: type[Model],
    row: Row,
    where: str,
    kind: str,
    schema: str,
    sentences: Mapping[str, str] = MappingProxyType({}),
) -> Model:
    """A row as its model.

    Parameters
    ----------
    where
        File, line and row.
    kind, schema
        What the row should be, and whose columns it should have, for the error.
    sentences
        For the error, what to say of a column whose value is wrong, in place of the model's words.

    Raises
    ------
    PipelineError
        A column is missing or its value is not what the model says.
    """
    try:
        return model.model_validate(row)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place, absent = problem["loc"], problem["type"] == "missing"
        column = ".".join(map(str, place))
        if absent and not (len(place) == 1 and place[0] in row):
            raise PipelineError(
                f"{where} lacks the column '{column}'; the source must have the columns of {schema}."
            ) from None
        reason = "it has no value" if absent else problem["msg"].removeprefix("Value error, ")
        reason = f"{column}: {reason}" if column else reason
        if not absent and problem["input"] is not row:
            reason += f", not {_short(problem['input'])}"
        sentence = sentences.get(str(place[0]) if place else "", f" is no row of {kind}")
        reason = reason.replace("Input should", "it should")
        raise PipelineError(f"{where}{sentence} ({reason}); correct or drop the row.") from None


def whole_number(value: Any) -> Any:
    """An integer for every spelling of one; other values as they are."""
    if isinstance(value, bool):
        raise ValueError("it should be a number")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}(\.0+)?", value):
        return int(value.partition(".")[0])
    return value


def flag(value: Any) -> Any:
    """A truth value for every spelling of one; other values as they are."""
    if isinstance(value, str) and value.lower() in _FLAGS:
        return _FLAGS[value.lower()]
    number = value if isinstance(value, bool) else whole_number(value)
    return bool(number) if number in (0, 1) else value


def _identifier(value: Any) -> Any:
    number = whole_number(value)
    return str(number) if isinstance(number, int) else value


def _encodable(value: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("it holds half of a surrogate pair, which is no character")
    return value


def _filled(value: str) -> str:
    if not value.strip():
        raise ValueError("it should not be blank")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
FilledText = Annotated[Text, AfterValidator(_filled)]
WholeNumber = Annotated[int, BeforeValidator(whole_number)]
Flag = Annotated[bool, BeforeValidator(flag)]
# A name that a tool may have taken for a number: 7, 7.0 and "7" are one.
Identifier = Annotated[FilledText, BeforeValidator(_identifier)]


def _parquet_rows(file: Path) -> list[Row]:
    # Not read_table: to it, a folder called label=1 gives every row of its files a column of that name.
    with pq.ParquetFile(file) as opened:
        table = opened.read()
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError("two of its columns have one name")
    rows: list[Row] = table.to_pylist()
    return rows


def _json_rows(file: Path | zipfile.Path, text: str) -> Iterator[tuple[str, Row]]:
    # Not splitlines: inside a string, characters such as U+2028 end no line.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            # What begins as a list is none, wherever it ends.
            row = None if line.lstrip().startswith("[") else parsed(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise PipelineError(
                f"{place}: every line must be a JSON object; where all rows are one list, write each of them on a line "
                "(jq -c '.[]')."
            )
        yield place, row


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {_short(twice)} is there twice")
    return row


def _short(value: Any) -> str:
    text = repr(value).encode("ascii", "backslashreplace").decode() if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
