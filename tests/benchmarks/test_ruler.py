"""RULER: NVIDIA's samples are NVIDIA's, splits share nothing, and what cannot be made is said."""

import json
import runpy
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.base import Answer, Sizes
from pipeline.benchmarks.ruler import TASKS, Ruler, split_answer_prefix, true_continuation
from pipeline.errors import PipelineError
from pipeline.ruler import splits
from pipeline.ruler.splits import units
from pipeline.ruler.wheel import Task, read_tasks
from pipeline.samples.sample import SPLITS, Sample
from tests.benchmarks.making import build, into, tokenizer_of

ANSWERS = {
    "niah_single_1": [" 1234567", ("1234567",)],
    "niah_multivalue": [" 12, 34", ("12", "34")],
    "vt": [" AB CD", ("AB", "CD")],
    "cwe": [" 1. one 2. two", ("one", "two")],
    "fwe": [" abc, def", ("abc", "def")],
    "qa_1": [" Paris", ("Paris", "city of Paris")],
}


@pytest.fixture(scope="module")
def tasks(ruler_wheel: Path) -> dict[str, Task]:
    return read_tasks(ruler_wheel)


@pytest.fixture(scope="module")
def params(ruler: Ruler) -> Ruler:
    return ruler


@pytest.fixture(scope="module")
def samples(ruler_samples: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    return ruler_samples


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return tokenizer_of(smollm2)


def prompt(tokenizer: Any, sample: Sample) -> str:
    # The default would drop spaces before dots.
    return tokenizer.decode(sample.input_ids[: sample.prompt_len], clean_up_tokenization_spaces=False)


def test_what_is_only_evaluated_is_the_same_test_split(
    samples: dict[str, list[Sample]],
    params: Ruler,
    ruler_wheel: Path,
    splitter_wheel: Path,
    smollm2: Path,
    tmp_path: Path,
) -> None:
    tasks = ("niah_single_1", "vt", "fwe")
    few = params.model_copy(update={"tasks": tasks, "sizes": Sizes(test=2)})
    lines: list[str] = []
    alone = build(few, ruler_wheel, smollm2, "ruler", into(lines), tmp_path, sentence_splitter=splitter_wheel)
    assert alone == {"test": [sample for sample in samples["test"] if sample.task in tasks]}
    assert len(lines) == few.pieces() == 3
    assert params.pieces() == 3 * 13


def test_every_task_has_its_samples(samples: dict[str, list[Sample]], params: Ruler, tokenizer: Any) -> None:
    for split in SPLITS:
        count = params.sizes.of(split)
        assert [sample.task for sample in samples[split]] == [task for task in TASKS for _ in range(count)]
    for sample in (sample for split in SPLITS for sample in samples[split]):
        text = prompt(tokenizer, sample)
        assert text.startswith("<|im_start|>system\n")
        assert text.count("<|im_start|>assistant\n") == 1
        assert text == text.rstrip()
        assert "<|im_start|>assistant\nThe special" in text or "<|im_start|>assistant\nAnswer:" in text
        # The end of turn is the configuration's; the tokenizer's own is wrong after the conversion from GGUF.
        assert sample.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        continuation = tokenizer.decode(sample.input_ids[sample.prompt_len : -1], clean_up_tokenization_spaces=False)
        assert continuation.startswith(" ")
        assert not continuation.startswith("  ")
        references = sample.answers[:1] if sample.task.startswith("qa") else sample.answers
        assert all(answer in continuation for answer in references)
        assert set(json.loads(sample.meta)) == {"seed", "length", "index"}
        # Only the test split is asked anything.
        assert sample.ask == (("likelihood", "text") if sample.split == "test" else ())
        if sample.split == "test":
            any_of = tuple((answer,) for answer in sample.answers)
            assert sample.enough == (any_of if sample.task.startswith("qa") else (sample.answers,))
    assert len({sample.sample_id for split in SPLITS for sample in samples[split]}) == 13 * 5


def test_splits_share_no_needle_and_no_document(
    samples: dict[str, list[Sample]], tasks: dict[str, Task], tokenizer: Any
) -> None:
    held: dict[str, set[str]] = {}
    for split in SPLITS:
        texts = [(tasks[sample.task], prompt(tokenizer, sample)) for sample in samples[split]]
        found = [units(task, text) for task, text in texts]
        # Nothing is disjoint because nothing was found.
        assert all(units for units, (task, _) in zip(found, texts, strict=True) if task.name != "cwe")
        assert all(len(units) == 10 for units, (task, _) in zip(found, texts, strict=True) if task.script == "qa")
        held[split] = set().union(*found)
    for one, other in combinations(SPLITS, 2):
        assert not held[one] & held[other]


def test_splits_share_no_text_of_the_essays(
    samples: dict[str, list[Sample]], tasks: dict[str, Task], tokenizer: Any
) -> None:
    held: dict[str, set[tuple[str, ...]]] = {}
    for split in SPLITS:
        held[split] = set()
        for sample in samples[split]:
            if tasks[sample.task].uses_essays:
                text = splits._NEEDLE.sub(" ", prompt(tokenizer, sample).split("afterwards.\n")[1])
                words = text.split("\nWhat ")[0].split()
                assert len(words) > 300
                held[split].update(zip(*(words[start:] for start in range(12)), strict=False))
    for one, other in combinations(SPLITS, 2):
        assert not held[one] & held[other]


def test_training_samples_do_not_share_one_haystack(samples: dict[str, list[Sample]], tokenizer: Any) -> None:
    starts = {
        task: prompt(tokenizer, next(s for s in samples["train"] if s.task == task)).split("afterwards.\n")[1][:60]
        for task in ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
    }
    assert len(set(starts.values())) == 5


def test_a_second_build_reads_back_and_is_equal(
    samples: dict[str, list[Sample]],
    params: Ruler,
    ruler_wheel: Path,
    splitter_wheel: Path,
    smollm2: Path,
    ruler_work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # That a fresh one is equal too is tested above.
    few = params.model_copy(update={"tasks": ("vt", "fwe")})
    shutil.copytree(ruler_work / "rows", tmp_path / "rows")
    monkeypatch.setattr(splits, "generate", lambda *_, **__: pytest.fail("finished tasks were made again"))
    again = build(few, ruler_wheel, smollm2, "ruler", work=tmp_path, sentence_splitter=splitter_wheel)
    assert again == {split: [s for s in samples[split] if s.task in few.tasks] for split in SPLITS}


@pytest.mark.parametrize("name", ANSWERS)
def test_true_continuation(tasks: dict[str, Task], name: str) -> None:
    expected, answers = ANSWERS[name]
    assert true_continuation(tasks[name], answers) == expected


def test_the_last_of_two_answer_prefixes_is_cut(tasks: dict[str, Task]) -> None:
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    text = f"list\nQuestion?{prefix}1. a 2. b\nlist\nQuestion?"
    assert split_answer_prefix(tasks["cwe"], text + prefix) == (text, prefix)
    with pytest.raises(PipelineError, match="lacks its answer prefix"):
        split_answer_prefix(tasks["cwe"], "no prefix here")


def sample(task: str, answers: tuple[str, ...]) -> Sample:
    return Sample("s", "ruler", task, "test", (1, 2), 1, None, answers, 8, "{}", ("text",))


def test_all_needles_count_and_any_alias_of_an_answer(params: Ruler) -> None:
    said = Answer("it is 12")
    assert params.score(sample("niah_multivalue", ("12", "34")), said) == {"string_match": 0.5}
    assert params.score(sample("qa_1", ("12", "34")), said) == {"string_match": 1.0}
    with pytest.raises(PipelineError, match="'qa_3' is no RULER task; known: niah_single_1"):
        params.score(sample("qa_3", ("a",)), said)


def test_every_task_has_the_official_metric(params: Ruler, tasks: dict[str, Task], ruler_wheel: Path) -> None:
    official = runpy.run_path(str(ruler_wheel / "long_context_eval/eval/synthetic/constants.py"))["TASKS"]
    for task in TASKS:
        metric = official[tasks[task].script]["metric_fn"]
        for text in ("it is 12", "12 34", "none"):
            found = params.score(sample(task, ("12", "34")), Answer(text))
            assert {"string_match": metric([text], [["12", "34"]]) / 100} == found, task
