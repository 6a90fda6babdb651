"""The columns of the results tables."""

from pathlib import Path

import polars as pl
import pytest
import torch

from pipeline.evaluation.results import (
    COST_SCHEMA,
    EVALUATION_SCHEMA,
    cost_table,
    evaluation_table,
    merge_parts,
    write_part,
)
from pipeline.evaluation.sweep import COST_GRID, FULL, ORACLE, Costs, Outcome, PolicyKey, ranking_costs
from pipeline.reporting import tables
from pipeline.samples.sample import Sample

SAMPLE = Sample("vt-0", "ruler", "vt", "test", (1, 2, 3), 2, None, ("x",), 4, "{}", "string_match")
LAYERS, KV_HEADS, N = 3, 2, 32
NUMBERS = (5, 11, 17)  # the model's numbers of the three layers
KVP = PolicyKey("kvp-exact", "dialogues")


@pytest.fixture
def importance() -> torch.Tensor:
    return torch.rand(LAYERS, KV_HEADS, N, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def costs(importance: torch.Tensor) -> list[Costs]:
    other = torch.rand(LAYERS, KV_HEADS, N, generator=torch.Generator().manual_seed(1))
    return list(ranking_costs(importance, {ORACLE: importance, KVP: other}))


def test_an_evaluation_table_has_one_row_per_outcome() -> None:
    outcomes = [
        Outcome(FULL, None, "string_match", 1.0, 3),
        Outcome(KVP, 48, "string_match", 0.5, 4),
        Outcome(PolicyKey("knorm"), 48, "string_match", 0.0, 4),
    ]
    table = evaluation_table("m", SAMPLE, outcomes)
    assert table.schema == pl.Schema(EVALUATION_SCHEMA)
    assert list(table.columns) == list(tables.EVALUATION_COLUMNS)
    assert table.rows() == [
        ("m", "full", None, "ruler", "vt", "vt-0", None, "string_match", 1.0, 3),
        ("m", "kvp-exact", "dialogues", "ruler", "vt", "vt-0", 48, "string_match", 0.5, 4),
        ("m", "knorm", None, "ruler", "vt", "vt-0", 48, "string_match", 0.0, 4),
    ]


def test_a_cost_table_has_every_head_at_every_budget(costs: list[Costs]) -> None:
    table = cost_table("m", SAMPLE, costs, NUMBERS)
    assert table.schema == pl.Schema(COST_SCHEMA)
    assert list(table.columns) == list(tables.COST_COLUMNS)
    assert table.height == 2 * LAYERS * KV_HEADS * COST_GRID
    grid = [N * k // COST_GRID for k in range(1, COST_GRID)]
    for (policy,), part in table.group_by("policy"):
        assert part["trained_on"].unique().to_list() == ["dialogues" if policy == "kvp-exact" else None]
        heads = part.group_by("layer", "kv_head", maintain_order=True).agg("budget")
        assert heads.select("layer", "kv_head").rows() == [(a, b) for a in NUMBERS for b in range(KV_HEADS)]
        assert heads["budget"].to_list() == [[*grid, None]] * (LAYERS * KV_HEADS)
    assert table.select("model", "corpus", "sample_id", "cache_size").unique().rows() == [("m", "ruler", "vt-0", N)]


def test_each_cost_is_that_of_its_head_and_budget(costs: list[Costs], importance: torch.Tensor) -> None:
    table = cost_table("m", SAMPLE, costs, NUMBERS).filter(pl.col("policy") == "oracle")
    for layer, kv_head, budget, cost, optimal in table.select(
        "layer", "kv_head", "budget", "cost", "optimal_cost"
    ).iter_rows():
        best = importance[NUMBERS.index(layer), kv_head].double().sort(descending=True).values
        # A null budget is the sum over all budgets that evict something and keep something.
        budgets = range(1, N) if budget is None else [budget]
        expected = sum(float(best[kept:].sum()) for kept in budgets)
        assert cost == pytest.approx(expected, rel=1e-5)
        assert optimal == pytest.approx(expected, rel=1e-5)


def test_parts_merge_in_the_order_given(costs: list[Costs], tmp_path: Path) -> None:
    parts = []
    for index in (2, 0, 1):
        sample = Sample(f"s{index}", "ruler", "vt", "test", (1, 2, 3), 2, None, ("x",), 4, "{}", "string_match")
        parts.append(tmp_path / f"{index}.parquet")
        write_part(parts[-1], cost_table("m", sample, costs, NUMBERS))
    merge_parts(parts, tmp_path / "merged" / "cost.parquet")
    merged = pl.read_parquet(tmp_path / "merged/cost.parquet")
    assert merged["sample_id"].unique(maintain_order=True).to_list() == ["s2", "s0", "s1"]
    assert merged.schema == pl.Schema(COST_SCHEMA)
    first = (tmp_path / "merged/cost.parquet").read_bytes()
    merge_parts(parts, tmp_path / "merged" / "cost.parquet")
    assert (tmp_path / "merged/cost.parquet").read_bytes() == first
