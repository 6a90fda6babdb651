"""LongBench's prompts against its own configuration and ``pred.py``."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.base import Answer, read_benchmark
from pipeline.benchmarks.longbench import _METRICS, TASKS, LongBench, read_documents
from pipeline.errors import PipelineError
from pipeline.metrics import METRICS
from pipeline.models.tokenizer import load_tokenizer
from pipeline.samples.sample import Sample
from tests.benchmarks.making import build, into, tokenizer_of, write
from tests.samples import tokenizers as tiny

# eval.py: the metric of each task; pred.py: the tasks without a chat template.
OFFICIAL_METRICS = {
    "qa_f1": {"narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"},
    "rouge_l": {"gov_report", "qmsum", "multi_news", "samsum"},
    "classification": {"trec"},
    "retrieval": {"passage_retrieval_en"},
    "count": {"passage_count"},
    "code_similarity": {"lcc", "repobench-p"},
}
PLAIN_TEXT = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
# No words of the template stand between context and input.
UNMARKED = {"trec", "triviaqa", "samsum", "repobench-p"}
HEADER = "<|im_end|>\n<|im_start|>assistant\n"


def row(task: str, number: int = 0, words: int = 5, **changes: Any) -> dict[str, Any]:
    return {
        "input": f"Which {{one}} is {number}?",
        "context": f"{{Context}} {number}: {' '.join(f'w{i}' for i in range(words))}.",
        "answers": [f"Paragraph {number}", "another"],
        "length": words,
        "dataset": task,
        "language": "en",
        "all_classes": ["Paragraph 0", "Date"] if task == "trec" else None,
        "_id": f"{task}-{number}",
    } | changes


def filled(task: str, entry: dict[str, Any]) -> str:
    """As ``pred.py`` does."""
    return TASKS[task].template.format(**entry)


def params(tasks: tuple[str, ...], **changes: Any) -> LongBench:
    return LongBench(
        **{
            "kind": "longbench",
            "tasks": tasks,
            "source": "rows",
            "length": 1000,
            "max_new_tokens": 100,
            "late_question": False,
            "sizes": {"test": 1},
            "seed": 1,
        }
        | changes
    )


def test_the_table_is_longbench_s() -> None:
    # Of {task: [dataset2prompt.json, dataset2maxlen.json]} at commit 2e00731 of github.com/THUDM/LongBench.
    table = {name: [task.template, task.max_new_tokens] for name, task in TASKS.items()}
    digest = "618f5f31b12e0e303944670f8e409fc450df8ee0138505d4b07b860b918fa878"
    assert hashlib.sha256(json.dumps(table).encode()).hexdigest() == digest
    assert {name: task.metric for name, task in TASKS.items()} == {
        name: metric for metric, names in OFFICIAL_METRICS.items() for name in names
    }
    assert {name for name, task in TASKS.items() if not task.chat} == PLAIN_TEXT
    assert set(OFFICIAL_METRICS) == {*_METRICS, "classification"} <= set(METRICS)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_pred_py_makes_them(task: str, tmp_path: Path, without_bos: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [row("lsht", 9), row(task, 4), row("dureader", 9)])
    lines: list[str] = []
    (sample,) = build(params((task,)), source, without_bos, "longbench", into(lines))["test"]
    tokenizer = tokenizer_of(without_bos)
    prompt = filled(task, row(task, 4))
    text = tokenizer.decode(sample.input_ids[: sample.prompt_len])
    answer = tokenizer.decode(sample.input_ids[sample.prompt_len :])
    if task in PLAIN_TEXT:
        assert text == prompt
        assert answer == ("Paragraph 4" if prompt[-1].isspace() else " Paragraph 4")
    else:
        assert text.endswith(f"<|im_start|>user\n{prompt}{HEADER}")
        assert answer == "Paragraph 4<|im_end|>"
    assert lines == [task]
    assert (sample.benchmark, sample.task, sample.split, sample.question_start) == ("longbench", task, "test", None)
    assert sample.answers == ("Paragraph 4", "another")
    assert sample.max_new_tokens == min(100, TASKS[task].max_new_tokens)
    assert sample.ask == ("text",)
    assert json.loads(sample.meta)["all_classes"] == row(task)["all_classes"]


@pytest.mark.parametrize("words", [5, 800], ids=["whole", "shortened"])
@pytest.mark.parametrize("task", TASKS)
def test_a_late_question_begins_behind_the_context(task: str, words: int, tmp_path: Path, smollm2: Path) -> None:
    entry = row(task, 4, words)
    source = write(tmp_path / f"{task}.jsonl", [entry]).parent
    early, late = (build(params((task,), late_question=late), source, smollm2)["test"][0] for late in (False, True))
    assert early.input_ids == late.input_ids
    tokenizer = tokenizer_of(smollm2)
    assert late.question_start is not None
    before = tokenizer.decode(late.input_ids[: late.question_start])
    after = tokenizer.decode(late.input_ids[late.question_start : late.prompt_len])
    question = TASKS[task].template.split("{context}")[1].format(input=entry["input"])
    assert after == question if task in PLAIN_TEXT else after == f"{question}{HEADER}"
    assert before.endswith(entry["context"][-10:])
    assert (entry["context"] in before) == (words == 5)


def test_a_long_prompt_loses_its_middle(tmp_path: Path, smollm2: Path) -> None:
    tokenizer = tokenizer_of(smollm2)
    entry = row("lcc", words=400)
    ids = tokenizer(filled("lcc", entry)).input_ids
    assert len(ids) > 800
    source = write(tmp_path / "lcc.jsonl", [entry]).parent
    for length in (501, len(ids) - 1):
        (sample,) = build(params(("lcc",), length=length), source, smollm2)["test"]
        half = length // 2
        text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
        assert tokenizer.decode(sample.input_ids[: sample.prompt_len]) == text
    (sample,) = build(params(("lcc",), length=len(ids)), source, smollm2)["test"]
    assert list(sample.input_ids[: sample.prompt_len]) == ids


def test_special_tokens_come_from_the_template_or_the_tokenizer(tmp_path: Path, with_bos: Path) -> None:
    tokenizer = tokenizer_of(with_bos)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    source = write(tmp_path / "rows.jsonl", [row("trec"), row("gov_report")])
    plain, chat = build(params(("trec", "gov_report")), source, with_bos)["test"]
    assert list(plain.input_ids[: plain.prompt_len]) == [start, *tokenizer.encode(filled("trec", row("trec")))[1:]]
    assert chat.input_ids[0] == start
    assert chat.input_ids[1] != start


@pytest.mark.parametrize("task", TASKS)
def test_ready_made_prompts_are_taken_as_they_are(task: str, tmp_path: Path) -> None:
    entry = row(task, 4)
    ready = {"task": task, "i": 0, "prompt": filled(task, entry), "answers": entry["answers"]}
    if task == "trec":
        ready["answers"] = {"answers": entry["answers"], "all_classes": entry["all_classes"]}
    found, expected = (
        read_documents(task, write(tmp_path / name, [content]))[0]
        for name, content in (("ready.jsonl", ready), ("rows.jsonl", entry))
    )
    assert (found.prompt, found.answers, found.classes) == (expected.prompt, expected.answers, expected.classes)
    assert found.late_from == (None if task in UNMARKED else expected.late_from)


def test_every_layout_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [row("qasper", number) for number in range(3)]
    expected = read_documents("qasper", write(tmp_path / "mixed.jsonl", [row("trec"), *rows]))
    assert len(expected) == 3
    # Files named after a task hold nothing else, whatever their rows call it.
    renamed = [entry | {"dataset": "qasper_e"} for entry in rows]
    write(tmp_path / "flat/qasper.jsonl", renamed)
    write(tmp_path / "folder/data/qasper.jsonl", renamed)
    (tmp_path / "hub").mkdir()
    with zipfile.ZipFile(tmp_path / "hub/data.zip", "w") as archive:
        archive.write(tmp_path / "flat/qasper.jsonl", "data/qasper.jsonl")
    for name in ("flat", "folder", "hub", "hub/data.zip"):
        assert read_documents("qasper", tmp_path / name) == expected


def test_each_task_gives_its_share(tmp_path: Path, smollm2: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [row(task, n) for n in range(9) for task in ("qasper", "qmsum")])

    def drawn(seed: int) -> dict[str, list[int]]:
        chosen = params(("qmsum", "qasper"), sizes={"test": 4}, seed=seed)
        samples = build(chosen, source, smollm2)["test"]
        assert len({sample.sample_id for sample in samples}) == 8
        by_task: dict[str, list[int]] = {"qmsum": [], "qasper": []}
        for sample in samples:
            by_task[sample.task].append(json.loads(sample.meta)["row"])
        return by_task

    for rows in drawn(1).values():
        assert len(set(rows)) == 4
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


READY = {"task": "qasper", "prompt": "Other words. Question: a?", "answers": ["b"]}


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ({"dataset": "qasper", "context": "a", "answers": ["b"]}, {}, "row 0 of qasper lacks the column 'input'"),
        ({"dataset": "qasper", "context": "a", "input": "b"}, {}, "row 0 of qasper lacks the column 'answers'"),
        (row("qasper", context=7), {}, "row 0 of qasper: context, input and prompt must be text"),
        (READY | {"prompt": None}, {}, "row 0 of qasper: context, input and prompt must be text"),
        (row("qasper", answers=[]), {}, "row 0 of qasper has no answers"),
        (row("qasper", answers=[7]), {}, "row 0 of qasper has no answers"),
        (row("trec", all_classes=None), {"tasks": ("trec",)}, "row 0 of trec has no all_classes"),
        (row("trec"), {}, "benchmarks.x: the source has 0 rows of qasper, 1 are wanted"),
        (READY, {"late_question": True}, "benchmarks.x: row 0 of qasper: the end of the context cannot be told"),
        (row("qasper"), {"late_question": True, "length": 60}, "half of length does not hold its question"),
    ],
)
def test_unusable_rows_are_one_sentence(
    entry: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path, smollm2: Path
) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        build(params(**{"tasks": ("qasper",)} | changes), write(tmp_path / "rows.jsonl", [entry]), smollm2, "x")
    assert "\n" not in str(caught.value)


def test_an_unknown_task_lists_the_known_ones(tmp_path: Path) -> None:
    section = params(("qasper",)).model_dump() | {"tasks": ("narrative",)}
    with pytest.raises(
        PipelineError, match=r"benchmarks\.x\.samples\.tasks: 'narrative' is no task of LongBench; known: n"
    ):
        read_benchmark("x", tmp_path / "params.yaml", {"benchmarks": {"x": {"samples": section}}})


@pytest.mark.parametrize("archive", [None, b"no zip"])
def test_a_directory_without_the_task_is_refused(archive: bytes | None, tmp_path: Path) -> None:
    if archive is not None:
        (tmp_path / "data.zip").write_bytes(archive)
    with pytest.raises(PipelineError, match=r"holds neither qasper.jsonl nor data/qasper.jsonl"):
        read_documents("qasper", tmp_path)


def test_a_template_that_changes_the_text_is_refused(tmp_path: Path, smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "upper")
    (tmp_path / "upper/config.json").write_text((smollm2 / "config.json").read_text())
    source = write(tmp_path / "rows.jsonl", [row("qasper")])
    with pytest.raises(PipelineError, match="row 0 of qasper: the chat template changes the text"):
        build(params(("qasper",), late_question=True), source, tmp_path / "upper", "x")


def test_a_shortened_prompt_keeps_its_last_token_before_an_appended_end(tmp_path: Path) -> None:
    entry = {"dataset": "lcc", "context": "x" * 400, "input": "", "answers": ["y"], "all_classes": None}
    source = write(tmp_path / "rows.jsonl", [entry])
    prompts = []
    for single in (None, "$A </s>"):
        model = tiny.save(tiny.byte_tokenizer(single=single), tmp_path / f"model{single}")
        (sample,) = build(params(("lcc",), length=100), source, model)["test"]
        prompts.append(sample.input_ids[: sample.prompt_len])
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 100


CLASSES = ["Date", "Order, rank", "Other number", "Order", "number", "Number of something"]


def scored(task: str, text: str, answers: Sequence[str], classes: list[str] | None = None) -> dict[str, float]:
    meta = json.dumps({"all_classes": classes})
    sample = Sample("s", "longbench", task, "test", (1, 2), 1, None, tuple(answers), 8, meta, ("text",))
    return params((task,)).score(sample, Answer(text))


# Values that metrics.py and eval.py of github.com/THUDM/LongBench (commit 2e00731) gave for the same strings.
@pytest.mark.parametrize(
    ("task", "prediction", "references", "expected"),
    [
        (
            "gov_report",
            "The agency spent money. It kept no records of it.",
            ["The agency kept no records. It spent public money."],
            0.8421052581717452,
        ),
        ("gov_report", "...", ["The agency."], 0.0),
        ("gov_report", "", ["The agency."], 0.0),
        (
            "multi_news",
            "the the the cat. sat on a mat",
            ["A cat sat on the mat. The end.", "the cat sat"],
            0.6666666622222223,
        ),
        ("samsum", "\n\nAnna is late.\nDialogue: Bob: hi", ["Anna is late."], 0.999999995),
        ("samsum", "Anna\nis late.", ["Anna is late."], 0.4999999962500001),
        ("narrativeqa", "The letter, she declined to read it!", ["She declined to read it.", "nothing"], 10 / 11),
        ("hotpotqa", "a the an", ["the"], 0.0),
        ("qasper", "it's 5-percent", ["its 5percent points"], 0.8),
        ("triviaqa", "\nfifty five\n55", ["55", "fifty-five", "Fifty Five!"], 1.0),
        ("passage_retrieval_en", "Paragraph 12, not 3 but 12", ["Paragraph 12"], 2 / 3),
        ("passage_retrieval_en", "Paragraph 112", ["Paragraph 12"], 0.0),
        ("passage_retrieval_en", "twelve", ["Paragraph 12"], 0.0),
        ("passage_count", "There are 7 of 17, so 7", ["7"], 2 / 3),
        ("passage_count", "07", ["7"], 0.0),
        ("passage_count", "none", ["7"], 0.0),
        ("trec", "Order, rank", ["Order, rank"], 1.0),
        ("trec", "Order, rank or Date", ["Order, rank"], 0.5),
        ("trec", "Number of something, Other number", ["Other number"], 0.5),
        ("trec", "Order\nDate", ["Order"], 1.0),
        ("trec", "Order, rank, number, Other number", ["Other number"], 1 / 3),
        (
            "lcc",
            "\n\n# first\n// second\n```py\n    return value + 1\nmore",
            ["    return value + 2"],
            0.95,
        ),
        ("lcc", "# only", ["x = 1"], 0.0),
        ("lcc", "if text == language:", ["            if e.text == language:"], 0.74),
        ("repobench-p", "", ["", "x"], 1.0),
        # difflib ignores letters that are frequent in a long text; a true edit distance would not.
        ("repobench-p", "abcabba" * 40, ["cbabac" * 45], 0.0),
    ],
)
def test_official_values(task: str, prediction: str, references: list[str], expected: float) -> None:
    score = scored(task, prediction, references, CLASSES if task == "trec" else None)
    assert score == {TASKS[task].metric: expected}
    assert isinstance(score[TASKS[task].metric], float)


@pytest.mark.parametrize(
    ("task", "answers", "text", "expected"),
    [
        ("qasper", ["yes", "no"], "No.", {"qa_f1": 1.0}),
        # The first line counts where the task says so.
        ("triviaqa", ["yes"], "yes\nand more", {"qa_f1": 1.0}),
        ("qasper", ["yes"], "yes\nand more", {"qa_f1": 0.5}),
        ("passage_retrieval_en", ["Paragraph 3"], "Paragraph 3 or 4", {"retrieval": 0.5}),
        ("passage_count", ["3"], "3", {"count": 1.0}),
        ("gov_report", ["one two"], "one two", {"rouge_l": 0.999999995}),
        ("lcc", ["x = 1"], "x = 1", {"code_similarity": 1.0}),
    ],
)
def test_metrics_are_the_task_s(task: str, answers: list[str], text: str, expected: dict[str, float]) -> None:
    assert scored(task, text, answers) == pytest.approx(expected, abs=1e-12)


def test_classes_come_from_the_meta_data() -> None:
    found = [scored("trec", text, ["Date"], ["Date", "City"]) for text in ("Date", "Date, City", "City")]
    assert found == [{"classification": value} for value in (1.0, 0.5, 0.0)]


@pytest.mark.parametrize(
    ("task", "answers", "message"),
    [
        ("qasper", [], "Sample s is of no task of LongBench or has no answers"),
        ("trec", ["a"], "classification needs the classes of 'trec'"),
        ("passage_retrieval_en", ["1"], "'1' names no paragraph"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(task: str, answers: list[str], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        scored(task, "1", answers)


def test_a_sample_of_another_benchmark_is_not_scored() -> None:
    sample = Sample("s", "ruler", "vt", "test", (1, 2), 1, None, ("a",), 8, "{}", ("text",))
    with pytest.raises(PipelineError, match="Sample s is of no task of LongBench"):
        params(("qasper",)).score(sample, Answer("a"))
