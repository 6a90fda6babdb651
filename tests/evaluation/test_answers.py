"""The tables that a sweep leaves: what was said, and what rankings cost."""

from pathlib import Path

import polars as pl
import pytest
import torch

from pipeline.evaluation.answers import answer_table, cost_table
from pipeline.evaluation.ask import Said
from pipeline.evaluation.costs import Costs, ranking_costs
from pipeline.evaluation.parts import merge_parts, write_part
from pipeline.evaluation.score import read_answers
from pipeline.samples.sample import Sample
from pipeline.tables import ANSWERS, COST, FULL, GRID, ORACLE, PolicyKey

SAMPLE = Sample("vt-0", "ruler", "vt", "test", (1, 2, 3), 2, None, ("x",), 4, "{}", ("text",))
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


def test_an_answer_table_has_one_row_for_each_thing_that_was_said(tmp_path: Path) -> None:
    nll = (0.1, 2.0, 1 / 3)  # float64, to the last bit
    said = [
        Said(FULL, None, "text", "y", (), 3),
        Said(FULL, None, "likelihood", None, nll, 3),
        Said(KVP, 48, "text", "", (), 4),
        Said(PolicyKey("knorm"), 48, "choice", None, (1.5, 2.5), 1),
    ]
    table = answer_table("m", SAMPLE, said)
    assert table.schema == pl.Schema(ANSWERS)
    assert table.rows() == [
        ("m", "full", None, "ruler", "vt", "vt-0", None, "text", "y", [], 3),
        ("m", "full", None, "ruler", "vt", "vt-0", None, "likelihood", None, list(nll), 3),
        ("m", "kvp-exact", "dialogues", "ruler", "vt", "vt-0", 48, "text", "", [], 4),
        ("m", "knorm", None, "ruler", "vt", "vt-0", 48, "choice", None, [1.5, 2.5], 1),
    ]
    write_part(tmp_path / "answers.parquet", table)
    assert read_answers(tmp_path / "answers.parquet").equals(table)


def test_a_cost_table_has_every_head_at_every_budget(costs: list[Costs]) -> None:
    table = cost_table("m", SAMPLE, costs, NUMBERS)
    assert table.schema == pl.Schema(COST)
    assert table.height == 2 * LAYERS * KV_HEADS * GRID
    grid = [N * k // GRID for k in range(1, GRID)]
    for (policy,), part in table.group_by("policy"):
        assert part["trained_on"].unique().to_list() == ["dialogues" if policy == "kvp-exact" else None]
        heads = part.group_by("layer", "kv_head", maintain_order=True).agg("budget")
        assert heads.select("layer", "kv_head").rows() == [(a, b) for a in NUMBERS for b in range(KV_HEADS)]
        assert heads["budget"].to_list() == [[*grid, None]] * (LAYERS * KV_HEADS)
    assert table.select("model", "benchmark", "sample_id", "cache_size").unique().rows() == [("m", "ruler", "vt-0", N)]


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
        sample = Sample(f"s{index}", "ruler", "vt", "test", (1, 2, 3), 2, None, ("x",), 4, "{}", ("text",))
        parts.append(tmp_path / f"{index}.parquet")
        write_part(parts[-1], cost_table("m", sample, costs, NUMBERS))
    merge_parts(parts, tmp_path / "merged" / "cost.parquet")
    merged = pl.read_parquet(tmp_path / "merged/cost.parquet")
    assert merged["sample_id"].unique(maintain_order=True).to_list() == ["s2", "s0", "s1"]
    assert merged.schema == pl.Schema(COST)
    first = (tmp_path / "merged/cost.parquet").read_bytes()
    merge_parts(parts, tmp_path / "merged" / "cost.parquet")
    assert (tmp_path / "merged/cost.parquet").read_bytes() == first
