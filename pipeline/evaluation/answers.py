"""What a sweep leaves of a sample: rows of the tables of answers and of costs. It knows no model."""

from collections.abc import Sequence

import polars as pl
import torch

from pipeline.evaluation.ask import Said
from pipeline.evaluation.costs import Costs
from pipeline.samples.sample import Sample
from pipeline.tables import ANSWERS, COST


def answer_table(model: str, sample: Sample, said: Sequence[Said]) -> pl.DataFrame:
    """The columns of ``ANSWERS`` (``pipeline/tables.py``) for one sample."""
    # What is asked is the answer's: the sample names all that it asks.
    rows = [{"model": model} | vars(sample) | vars(found.key) | vars(found) for found in said]
    table = [tuple(row[name] for name in ANSWERS) for row in rows]
    return pl.DataFrame(table, schema=ANSWERS, orient="row")


def cost_table(model: str, sample: Sample, costs: Sequence[Costs], layer_numbers: Sequence[int]) -> pl.DataFrame:
    """The columns of ``COST`` for one sample; a null ``budget`` is the sum over all budgets.

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
                benchmark=pl.lit(sample.benchmark),
                sample_id=pl.lit(sample.sample_id),
                cache_size=pl.lit(cost.cache_size),
            )
        )
    return pl.concat(frames).select(pl.col(name).cast(dtype) for name, dtype in COST.items())
