"""What a row of studies/results/sensitivity.parquet holds, and the values that its readers must know."""

import polars as pl

COST_SCHEMA = {
    "benchmark": pl.String,
    "length": pl.Int32,
    "step": pl.Int32,
    "layer": pl.Int32,
    "kv_head": pl.Int32,
    "cost": pl.Float32,
}
STUDY_COLUMNS = ("axis", "value", "seed", "model", "trained_on", "trained_length", *COST_SCHEMA)
# Axis and value of the variant that all others are compared with.
BASE = ("estimator", "exact")
# What ends the value of a variant whose agents see no position.
NO_POSITION = ", no position"
