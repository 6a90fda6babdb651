"""Answers, judged: what a benchmark says of them, and likelihoods as they are. It runs no model."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch

from pipeline.benchmarks.base import Answer, Benchmark
from pipeline.errors import PipelineError, one_line
from pipeline.metrics import METRICS
from pipeline.samples.sample import Sample
from pipeline.tables import ANSWERS, EVALUATION


def read_answers(path: Path) -> pl.DataFrame:
    """What the evaluate stage wrote.

    Raises
    ------
    PipelineError
        The file is missing or damaged, or has not the columns of ``ANSWERS``.
    """
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PipelineError(f"{path} holds no answers ({one_line(error)}); run the evaluate stage again.") from None
    if frame.schema != ANSWERS:
        raise PipelineError(f"{path} has not the columns of answers; run the evaluate stage again.")
    return frame


def score_answers(benchmark: Benchmark, samples: Sequence[Sample], answers: pl.DataFrame) -> pl.DataFrame:
    """The columns of ``EVALUATION`` (``pipeline/tables.py``) for the columns of ``ANSWERS``, in their order.

    ``samples`` are the test samples that were answered.

    Raises
    ------
    PipelineError
        An answer is to none of the samples, or cannot be judged.
    """
    by_id = {sample.sample_id: sample for sample in samples}
    rows = []
    for row in answers.iter_rows(named=True):
        if row["sample_id"] not in by_id:
            raise PipelineError(
                f"The answers hold sample {row['sample_id']}, which is not among the test samples; run the evaluate "
                "stage again."
            )
        if row["ask"] == "likelihood":
            judgement = {"nll": float(torch.tensor(row["nll"], dtype=torch.float64).mean())}
        else:
            judgement = benchmark.score(by_id[row["sample_id"]], Answer(row["text"], row["nll"]))
        for metric, value in judgement.items():
            if metric not in METRICS:
                raise PipelineError(
                    f"{benchmark.kind} gives the metric '{metric}', which METRICS in pipeline/metrics.py lacks; add it."
                )
            judged = row | {"metric": metric, "value": value}
            rows.append(tuple(judged[name] for name in EVALUATION))
    return pl.DataFrame(rows, schema=EVALUATION, orient="row")
