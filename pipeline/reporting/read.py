"""Result tables and records, read and held to what is asked of them. It knows no folder and no policy."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import PipelineError, one_line
from pipeline.tables import COST, CURVES, EVALUATION

# The numbers of these tables that are averaged, and what tells their rows apart: an average hides one that is none.
_AVERAGED = {
    tuple(EVALUATION): (("value", "n_tokens"), ("policy", "trained_on", "budget", "benchmark", "sample_id")),
    tuple(COST): (("cache_size", "cost", "optimal_cost"), ("policy", "trained_on", "benchmark", "sample_id")),
    tuple(CURVES): (("value",), ("metric", "step", "layer", "kv_head")),
}


def read_table(path: Path, columns: Iterable[str]) -> pl.DataFrame:
    """A Parquet file's ``columns``, such as ``EVALUATION``.

    Raises
    ------
    PipelineError
        The file is missing or damaged, lacks a column, or holds what is no finite number where numbers are averaged.
    """
    columns = tuple(columns)
    if not path.is_file():
        raise PipelineError(f"{path} does not exist; run the stage that makes it (dvc repro does).")
    try:
        frame = pl.scan_parquet(path)
        missing = sorted(set(columns) - set(frame.collect_schema().names()))
        if missing:
            raise PipelineError(f"{path} lacks the columns {', '.join(missing)}; run the stage that makes it again.")
        table = frame.select(columns).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); run the stage that makes it again.") from None
    numbers, names_of_row = _AVERAGED.get(columns, ((), ()))
    for name in numbers:
        if not table.schema[name].is_numeric():
            raise PipelineError(
                f"{path}: its column {name} is {table.schema[name]} and no number; run the stage that makes it again."
            )
        bad = table.filter(pl.col(name).is_null() | ~pl.col(name).cast(pl.Float64).is_finite())
        if not bad.is_empty():
            row = bad.row(0, named=True)
            where = ", ".join(f"{column} {row[column]}" for column in names_of_row if row[column] is not None)
            raise PipelineError(
                f"{path}: {name} is not finite but {row[name]} for {where}; run the stage that makes it again, in "
                "float32 if it persists."
            )
    return table


def read_tables(paths: Iterable[Path], columns: Collection[str]) -> pl.DataFrame:
    """Tables one below the other; raises as :func:`read_table`."""
    return pl.concat((read_table(path, columns) for path in paths), how="vertical_relaxed")


def read_curves(paths: Mapping[tuple[str, str, str], Path]) -> pl.DataFrame:
    """Training curves of policies, by model, trained_on and estimator, which become columns."""
    return pl.concat(
        read_table(path, CURVES).with_columns(
            model=pl.lit(model), trained_on=pl.lit(trained_on), estimator=pl.lit(estimator)
        )
        for (model, trained_on, estimator), path in paths.items()
    )


def read_prompts(paths: Mapping[tuple[str, str], Path]) -> pl.DataFrame:
    """Samples and prompt lengths of each task, from the sample files of (model, benchmark).

    Returns
    -------
    model, benchmark, task, samples, mean_tokens, min_tokens, max_tokens.
    """
    length = pl.col("prompt_len")
    return pl.concat(
        read_table(path, ("task", "prompt_len"))
        .group_by("task", maintain_order=True)
        .agg(samples=pl.len(), mean_tokens=length.mean(), min_tokens=length.min(), max_tokens=length.max())
        .select(pl.lit(model).alias("model"), pl.lit(benchmark).alias("benchmark"), pl.all())
        for (model, benchmark), path in paths.items()
    )


def read_records(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """JSON objects by what they are about, of the files that there are.

    Raises
    ------
    PipelineError
        A file is damaged.
    """
    found = {}
    for what, path in paths.items():
        if path.is_file():
            try:
                found[what] = json.loads(path.read_bytes())
            except ValueError as error:
                raise PipelineError(
                    f"{path} is no JSON ({one_line(error)}); run the stage that makes it again."
                ) from None
    return found
