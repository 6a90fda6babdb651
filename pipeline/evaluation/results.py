"""The columns of the two results tables, one Parquet part per sample. It knows no model."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch

from pipeline.evaluation.sweep import Costs, Outcome
from pipeline.samples.sample import Sample
from pipeline.workdir import atomic_write

EVALUATION_SCHEMA = {
    "model": pl.String,
    "policy": pl.String,
    "trained_on": pl.String,
    "benchmark": pl.String,
    "task": pl.String,
    "sample_id": pl.String,
    "budget": pl.Int32,
    "metric": pl.String,
    "value": pl.Float64,
    "n_tokens": pl.Int32,
}
COST_SCHEMA = {
    "model": pl.String,
    "policy": pl.String,
    "trained_on": pl.String,
    "corpus": pl.String,
    "sample_id": pl.String,
    "layer": pl.Int16,
    "kv_head": pl.Int16,
    "cache_size": pl.Int32,
    "budget": pl.Int32,
    "cost": pl.Float32,
    "optimal_cost": pl.Float32,
}


def evaluation_table(model: str, sample: Sample, outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """Rows of results/evaluation.parquet for one sample; ``budget`` is null where nothing was evicted."""
    rows = [
        (
            model,
            outcome.key.policy,
            outcome.key.trained_on,
            sample.corpus,
            sample.task,
            sample.sample_id,
            outcome.budget,
            outcome.metric,
            outcome.value,
            outcome.n_tokens,
        )
        for outcome in outcomes
    ]
    return pl.DataFrame(rows, schema=EVALUATION_SCHEMA, orient="row")


def cost_table(model: str, sample: Sample, costs: Sequence[Costs], layer_numbers: Sequence[int]) -> pl.DataFrame:
    """Rows of results/cost.parquet for one sample; a null ``budget`` is the sum over all budgets.

    ``layer_numbers`` are the model's numbers of the ranked layers.
    """
    frames = []
    for cost in costs:
        layers, kv_heads, grid = cost.cost.shape
        # The sum over all budgets is one more point of the grid.
        points = torch.cat([cost.cost, cost.total[..., None]], dim=-1).flatten()
        optimal = torch.cat([cost.optimal, cost.optimal_total[..., None]], dim=-1).flatten()
        size = grid + 1
        frames.append(
            pl.DataFrame(
                {
                    "layer": torch.tensor(layer_numbers).repeat_interleave(kv_heads * size).tolist(),
                    "kv_head": torch.arange(kv_heads).repeat_interleave(size).repeat(layers).tolist(),
                    "budget": [*cost.budgets.tolist(), None] * (layers * kv_heads),
                    "cost": points.tolist(),
                    "optimal_cost": optimal.tolist(),
                }
            ).with_columns(
                model=pl.lit(model),
                policy=pl.lit(cost.key.policy),
                trained_on=pl.lit(cost.key.trained_on, dtype=pl.String),
                corpus=pl.lit(sample.corpus),
                sample_id=pl.lit(sample.sample_id),
                cache_size=pl.lit(cost.cache_size),
            )
        )
    return pl.concat(frames).select(pl.col(name).cast(dtype) for name, dtype in COST_SCHEMA.items())


def write_part(path: Path, table: pl.DataFrame) -> None:
    """Write one sample's rows, atomically; existing parts are what an interrupted sweep continues from."""
    with atomic_write(path) as temporary:
        table.write_parquet(temporary, compression="zstd")


def merge_parts(parts: Sequence[Path], out: Path) -> None:
    """Concatenate parts, in the order given, into one table."""
    write_part(out, pl.concat([pl.read_parquet(part) for part in parts]))
