"""Answers, judged: the numbers are those of the metrics, and what cannot be judged is one sentence."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from pipeline.benchmarks.base import Benchmark
from pipeline.errors import PipelineError
from pipeline.evaluation.answers import answer_table
from pipeline.evaluation.ask import Said
from pipeline.evaluation.score import read_answers, score_answers
from pipeline.metrics import string_match_all
from pipeline.params import Params
from pipeline.samples.sample import Sample
from pipeline.tables import ANSWERS, EVALUATION, FULL, PolicyKey
from tests.benchmarks.making import choice

SAMPLE = Sample("vt-0", "ruler", "vt", "test", (1, 2, 3), 2, None, ("ab", "CD"), 4, "{}", ("likelihood", "text"))
CHOSEN = Sample(
    "test-0", "boolq", "boolq", "test", (1, 2, 3), 2, None, ("no", "perhaps"), 0, "{}", ("choice",), (), ((1,), (2,)), 1
)
KVP = PolicyKey("kvp-exact", "dialogues")


@pytest.fixture(scope="module")
def ruler(default_params: Params) -> Benchmark:
    return default_params.benchmarks["ruler"].samples


def values(table: pl.DataFrame) -> list[tuple[str, float]]:
    return list(table.select("metric", "value").iter_rows())


def test_a_row_of_the_results_for_each_answer_and_metric(ruler: Benchmark) -> None:
    said = [
        Said(FULL, None, "likelihood", None, (1.0, 2.0), 2),
        Said(KVP, 48, "likelihood", None, (3.0, 4.0), 2),
        Said(FULL, None, "text", "abcd", (), 3),
        Said(KVP, 48, "text", "xcd", (), 4),
    ]
    table = score_answers(ruler, [SAMPLE], answer_table("m", SAMPLE, said))
    assert table.schema == pl.Schema(EVALUATION)
    assert table.rows() == [
        ("m", "full", None, "ruler", "vt", "vt-0", None, "nll", 1.5, 2),
        ("m", "kvp-exact", "dialogues", "ruler", "vt", "vt-0", 48, "nll", 3.5, 2),
        ("m", "full", None, "ruler", "vt", "vt-0", None, "string_match", 1.0, 3),
        ("m", "kvp-exact", "dialogues", "ruler", "vt", "vt-0", 48, "string_match", 0.5, 4),
    ]


@given(nll=st.lists(st.floats(0, 50, width=32), min_size=1, max_size=600))
def test_a_likelihood_is_the_mean_in_float64(nll: list[float]) -> None:
    found = Said(FULL, None, "likelihood", None, tuple(nll), len(nll))
    ((metric, value),) = values(score_answers(choice("boolq"), [SAMPLE], answer_table("m", SAMPLE, [found])))
    assert metric == "nll"
    # What the sweep itself would say of the model's float32 numbers.
    assert value == tensor(nll).double().mean().item()
    assert value == pytest.approx(fmean(nll), rel=1e-12)


@given(text=st.text("abcdABCD ", max_size=8))
def test_a_text_is_matched(ruler: Benchmark, text: str) -> None:
    found = Said(FULL, None, "text", text, (), len(text))
    table = score_answers(ruler, [SAMPLE], answer_table("m", SAMPLE, [found]))
    assert values(table) == [("string_match", string_match_all(text, SAMPLE.answers))]


@pytest.mark.parametrize(("task", "metric"), [("boolq", "accuracy"), ("hellaswag", "accuracy_norm")])
@given(nll=st.lists(st.floats(0.01, 50), min_size=2, max_size=2), gold=st.integers(0, 1))
def test_a_choice_is_right_or_wrong(task: str, metric: str, nll: list[float], gold: int) -> None:
    sample, found = replace(CHOSEN, gold=gold), Said(FULL, None, "choice", None, tuple(nll), 1)
    table = score_answers(choice(task), [sample], answer_table("m", sample, [found]))
    lengths = np.array([len(answer) for answer in sample.answers]) if metric == "accuracy_norm" else 1
    assert values(table) == [(metric, float(np.argmax(-np.array(nll) / lengths) == gold))]
    assert table["n_tokens"].to_list() == [1]


def test_samples_are_found_by_their_id(ruler: Benchmark) -> None:
    other = replace(SAMPLE, sample_id="vt-1", answers=("zz",))
    said = [Said(FULL, None, "text", "ab CD", (), 4)]
    answers = pl.concat([answer_table("m", sample, said) for sample in (other, SAMPLE)])
    assert score_answers(ruler, [SAMPLE, other], answers)["value"].to_list() == [0.0, 1.0]
    with pytest.raises(PipelineError, match="The answers hold sample vt-1, which is not among the test samples"):
        score_answers(ruler, [SAMPLE], answers)


def test_many_answers_of_one_kind_may_come_before_another(ruler: Benchmark) -> None:
    likelihoods = [Said(PolicyKey("knorm"), budget, "likelihood", None, (1.0,), 1) for budget in range(1, 1000)]
    texts = [Said(PolicyKey("knorm"), budget, "text", "ab", (), 1) for budget in range(1, 1000)]
    table = score_answers(ruler, [SAMPLE], answer_table("m", SAMPLE, [*likelihoods, *texts]))
    assert table["value"].to_list() == [1.0] * 999 + [0.5] * 999


def test_no_answers_give_an_empty_table(ruler: Benchmark) -> None:
    table = score_answers(ruler, [SAMPLE], pl.DataFrame(schema=ANSWERS))
    assert (table.schema, table.height) == (pl.Schema(EVALUATION), 0)


def test_answers_that_cannot_be_judged_are_one_sentence(ruler: Benchmark) -> None:
    for benchmark, sample, found, message in (
        (ruler, replace(SAMPLE, task="qa_3"), Said(FULL, None, "text", "a", (), 1), "'qa_3' is no RULER task"),
        (choice("boolq"), CHOSEN, Said(FULL, None, "choice", None, (1.0,), 1), "2 choices have 1 likelihoods"),
        (choice("boolq"), CHOSEN, Said(FULL, None, "choice", None, (1.0, float("nan")), 1), "are not finite"),
    ):
        with pytest.raises(PipelineError, match=message):
            score_answers(benchmark, [sample], answer_table("m", sample, [found]))


def test_files_that_hold_no_answers_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "answers.parquet"
    with pytest.raises(PipelineError, match=r"answers\.parquet holds no answers .* run the evaluate stage again"):
        read_answers(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(PipelineError, match="holds no answers") as caught:
        read_answers(path)
    assert "\n" not in str(caught.value)
    pl.DataFrame({"model": ["m"]}).write_parquet(path)
    with pytest.raises(PipelineError, match="has not the columns of answers; run the evaluate stage again"):
        read_answers(path)
