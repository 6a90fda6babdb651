"""The columns of every table that crosses a stage's border, once each. It knows no writer and no reader."""

from dataclasses import dataclass

import polars as pl

GRID = 16
"""Costs are computed at these fractions of a cache: k / GRID, k = 1 .. GRID - 1; and once over all budgets."""


@dataclass(frozen=True)
class PolicyKey:
    """How a row of the results names its policy; ``trained_on`` is None for what is not trained."""

    policy: str
    trained_on: str | None = None


FULL, ORACLE = PolicyKey("full"), PolicyKey("oracle")


def trained_policy(trained_on: str, estimator: str) -> PolicyKey:
    """How the results name a policy of ours; baselines go by their names in params.yaml."""
    return PolicyKey(f"kvp-{estimator}", trained_on)


Columns = dict[str, pl.DataType | type[pl.DataType]]

_ROW: Columns = {
    "model": pl.String,
    "policy": pl.String,
    "trained_on": pl.String,
    "benchmark": pl.String,
    "task": pl.String,
    "sample_id": pl.String,
    "budget": pl.Int32,
}

ANSWERS: Columns = _ROW | {"ask": pl.String, "text": pl.String, "nll": pl.List(pl.Float64), "n_tokens": pl.Int32}
"""What each policy said at each budget; ``budget`` is null where nothing was evicted.

``ask`` is an ``Ask`` of ``pipeline/samples/sample.py``; ``text`` is null and ``nll``, nats, empty where another was
asked. ``n_tokens`` were written or predicted.
"""

EVALUATION: Columns = _ROW | {"metric": pl.String, "value": pl.Float64, "n_tokens": pl.Int32}
"""The answers, judged."""

COST: Columns = {
    "model": pl.String,
    "policy": pl.String,
    "trained_on": pl.String,
    "benchmark": pl.String,
    "sample_id": pl.String,
    "layer": pl.Int16,
    "kv_head": pl.Int16,
    "cache_size": pl.Int32,
    "budget": pl.Int32,
    "cost": pl.Float32,
    "optimal_cost": pl.Float32,
}
"""Importance of the tokens that a policy's order and the best order evict; ``budget`` is null for the sum over all."""

CURVES: Columns = {"step": pl.Int32, "layer": pl.Int32, "kv_head": pl.Int32, "metric": pl.String, "value": pl.Float32}
"""What a training was like: ``loss``, ``gradient_norm`` and ``validation_cost`` of each head."""

TOKENS: Columns = {
    "sample_id": pl.String,
    "task": pl.String,
    "policy": pl.String,
    "trained_on": pl.String,
    "layer": pl.Int16,
    "kv_head": pl.Int16,
    "position": pl.Int32,
    "token": pl.String,
    "importance": pl.Float32,
    "rank": pl.Int32,
}
"""The texts that are shown token by token, with every policy's order of them."""
