"""The study on made-up traces: what it trains, what it reports, and what an interruption costs."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from pipeline.policy.agents import load_policy
from pipeline.policy.train import describe, train_policy, validation_cost
from pipeline.traces.shards import ExampleReader
from studies.sensitivity.columns import BASE, STUDY_COLUMNS
from studies.sensitivity.hidden import HiddenReader
from studies.sensitivity.params import StudySensitivity
from studies.sensitivity.study import count_trainings, run_study, subset
from studies.sensitivity.trace_sets import TraceSet
from studies.sensitivity.variants import variants
from tests.studies.sensitivity.conftest import ESTIMATORS, STUDY, TRAIN, Sets

Advance = Callable[[int, str], None]


def study(
    work: Path, traces: Sets, sensitivity: StudySensitivity = STUDY, stop_after: int = 0
) -> tuple[pl.DataFrame, int, int]:
    """The table, the trainings reported and the training steps taken. ``stop_after`` steps, Ctrl-C is pressed."""
    trainings, steps = 0, 0

    def advance(count: int, _status: str) -> None:
        nonlocal trainings, steps
        trainings += count
        steps += count == 0
        if stop_after and steps == stop_after:
            raise KeyboardInterrupt

    trained = list(traces.trained.values())
    table = run_study(work, trained, traces.longer, TRAIN, ESTIMATORS, sensitivity, 1 << 20, "cpu", advance)
    return table, trainings, steps


@pytest.fixture(scope="module")
def finished(traces: Sets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    """A study and its work directory."""
    work = tmp_path_factory.mktemp("work")
    table, trainings, _ = study(work, traces)
    assert trainings == 2 * count_trainings(TRAIN, ESTIMATORS, STUDY) == 2 * 2 * 16
    return work, table


def test_the_table_has_every_variant_seed_head_and_benchmark(finished: tuple[Path, pl.DataFrame]) -> None:
    _, table = finished
    assert tuple(table.columns) == STUDY_COLUMNS
    # In the order of the axes, which tables and figures keep.
    expected = [(variant.axis, variant.value) for variant in variants(TRAIN, ESTIMATORS, STUDY, 3)]
    assert table.select("axis", "value").unique(maintain_order=True).rows() == expected
    assert not table.select(pl.exclude("cost")).is_duplicated().any()
    assert table["cost"].is_finite().all()
    assert (table["cost"] >= 0.999).all()
    final = table.filter(pl.col("step") == pl.col("step").max().over("axis", "value"))
    assert set(final.select("layer", "kv_head").iter_rows()) == {(1, 0), (1, 1), (3, 0), (3, 1)}
    same_length = final.filter(pl.col("length") == 512)
    assert same_length.height == 20 * 2 * 2 * 2 * 4  # variants, seeds, trained_on, benchmarks, heads
    assert set(table["trained_length"]) == {512}
    curves = table.filter(pl.col("axis") == "estimator", pl.col("benchmark") == pl.col("trained_on"))
    assert set(curves["step"]) == {1, 20, 40, 60}


def test_longer_sequences_are_for_the_base_and_for_other_inputs(finished: tuple[Path, pl.DataFrame]) -> None:
    _, table = finished
    far = table.filter(pl.col("length") == 1024)
    assert set(far.select("trained_on", "benchmark").iter_rows()) == {("ruler", "ruler")}
    assert set(far["step"]) == {60}
    inputs = {
        (variant.axis, variant.value) for variant in variants(TRAIN, ESTIMATORS, STUDY, 3) if variant.axis == "inputs"
    }
    through_the_base = {("training_fraction", "1"), ("steps", "60"), ("hidden_width", "16"), BASE}
    assert set(far.select("axis", "value").iter_rows()) == inputs | through_the_base
    assert far.height == (8 + 4) * 2 * 4  # variants, seeds, heads


@pytest.mark.parametrize("inputs", ["both", "hidden"])
def test_costs_are_those_of_the_policy_trained_on_these_layers(
    inputs: str, finished: tuple[Path, pl.DataFrame], traces: Sets, tmp_path: Path
) -> None:
    _, table = finished

    def reader(found: TraceSet, split: str) -> ExampleReader:
        if inputs == "hidden":
            return HiddenReader(found.traces, found.hidden, split, 0, layers=[1, 3])
        return ExampleReader(found.traces, split, 0, layers=[1, 3])

    ruler = traces.trained["ruler"]
    train, own = reader(ruler, "train"), reader(ruler, "validation")
    params = next(
        v.training.params for v in variants(TRAIN, ESTIMATORS, STUDY, 3) if (v.axis, v.value) == ("inputs", inputs)
    )
    config = describe(params, train, ESTIMATORS["exact"])
    train_policy(tmp_path, train, own, ESTIMATORS["exact"], params, config, "cpu", lambda _count, _status: None)
    policy, _ = load_policy(tmp_path, "tiny", hidden_states=True)
    rows = table.filter(axis="inputs", value=inputs, seed=3, trained_on="ruler", step=60)
    for evaluated in (*traces.trained.values(), *traces.longer.values()):
        found = rows.filter(benchmark=evaluated.benchmark, length=evaluated.length).sort("layer", "kv_head")
        assert found["layer"].to_list() == [1, 1, 3, 3]
        assert found["cost"].to_list() == pytest.approx(
            validation_cost(policy, reader(evaluated, "validation"), "cpu").tolist(), rel=1e-6
        )


def test_the_study_finds_what_these_traces_hide(finished: tuple[Path, pl.DataFrame]) -> None:
    _, table = finished
    mean = {
        key: float(part["cost"].mean())  # type: ignore[arg-type]
        for key, part in table.filter(step=60, length=512).group_by("value", "trained_on", "benchmark")
    }
    # Importance is a function of the keys, of another channel in each benchmark; values and positions say nothing.
    # Hidden states hold all keys.
    both, keys = mean["both", "ruler", "ruler"], mean["keys, no position", "ruler", "ruler"]
    hidden = mean["hidden, no position", "ruler", "ruler"]
    blind, elsewhere = mean["values", "ruler", "ruler"], mean["both", "ruler", "dialogues"]
    assert max(both, keys, hidden) - 1 < 0.4 * (min(blind, elsewhere) - 1)


def test_finished_trainings_are_not_made_again(finished: tuple[Path, pl.DataFrame], traces: Sets) -> None:
    work, table = finished
    again, _, steps = study(work, traces)
    assert steps == 0
    assert again.equals(table)
    assert not [path for path in work.glob("*/*") if path.is_dir()]
    wider = STUDY.model_copy(update={"hidden_width": (4, 8, 16)})
    _, trainings, steps = study(work, traces, wider)
    assert trainings == 2 * 2 * 17
    assert steps == 2 * 2 * (STUDY.base_steps + 1)  # the new width, with the call that reports the start


def test_an_interrupted_study_ends_with_the_same_table(
    finished: tuple[Path, pl.DataFrame], traces: Sets, tmp_path: Path
) -> None:
    _, table = finished
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, traces, stop_after=100)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.parquet")}
    assert done
    again, _, _ = study(tmp_path, traces)
    assert again.equals(table)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_subsets_are_nested_and_differ_between_seeds() -> None:
    for seed in range(3):
        eighth, half = (set(subset(65, fraction, seed)) for fraction in (1 / 8, 1 / 2))
        assert (len(eighth), len(half)) == (8, 32)
        assert eighth < half < set(range(65))
    assert subset(65, 0.5, 0) == sorted(subset(65, 0.5, 0))
    assert subset(65, 0.5, 0) != subset(65, 0.5, 1)
    assert len(subset(3, 0.01, 0)) == 1
