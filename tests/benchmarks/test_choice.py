"""Multiple choice against strings that lm-eval 0.4.13 rendered, and token ids against its way of cutting."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.benchmarks.base import Answer
from pipeline.benchmarks.base_choice import Question
from pipeline.errors import PipelineError
from pipeline.samples.sample import Sample
from tests.benchmarks.making import CHOICES, build, choice, into, read_questions, tokenizer_of, write
from tests.samples import tokenizers as tiny

# task -> rows with the hub's columns.
HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"question": "is it  raining", "passage": "Rain -- Water falls, {{often}}.  ", "idx": 3, "label": 1},
        {"question": "Is snow warm?", "passage": "Snow is cold.\nIce too.", "idx": 4, "label": 0},
    ],
    "arc_challenge": [
        {
            "id": "Mercury_1",
            "question": "Which is hot?",
            "choices": {"text": ["ice", "the sun", 'it\'s "snow"'], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {
            "id": "Mercury_2",
            "question": "What grows ",
            "choices": {"text": ["a stone", "iron", "glass", "a tree", "air"], "label": ["A", "B", "C", "D", "E"]},
            "answerKey": "D",
        },
    ],
    "mmlu": [
        {
            "question": " What is 2+2?\n",
            "subject": "abstract_algebra",
            "choices": ["3", "4", " 5", "six"],
            "answer": 1,
        },
        {
            "question": "Who?\nStatement 1 | He.",
            "subject": "us_foreign_policy",
            "choices": ["a", "b", "c", "d"],
            "answer": 3,
        },
    ],
    "hellaswag": [
        {
            "ind": 4,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": ["is using wrap.", "is  ripping tiles off.", "holds a [red] cube.", "starts pulling."],
            "label": "3",
        },
        {
            "ind": 9,
            "activity_label": "Home and Garden",
            "ctx_a": "[header] How to fix  a door [title] Buy a hinge. [step] Measure it. [substeps]",
            "ctx_b": "",
            "endings": ["[title] Saw. [step] Go on.", "Paint it.", "Sell [the] door.", "A [title] b   c."],
            "label": "0",
        },
    ],
}
# task -> what lm-eval 0.4.13 makes of them: its contexts, choices and targets, zero-shot
# (tests/studies/harness/test_compare.py asks it).
RENDERED: dict[str, list[tuple[str, list[str], int]]] = {
    "boolq": [
        ("Rain -- Water falls, {{often}}.  \nQuestion: is it  raining?\nAnswer:", ["no", "yes"], 1),
        ("Snow is cold.\nIce too.\nQuestion: Is snow warm??\nAnswer:", ["no", "yes"], 0),
    ],
    "arc_challenge": [
        ("Question: Which is hot?\nAnswer:", ["ice", "the sun", 'it\'s "snow"'], 1),
        ("Question: What grows \nAnswer:", ["a stone", "iron", "glass", "a tree", "air"], 3),
    ],
    "mmlu": [
        (
            "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
            "What is 2+2?\nA. 3\nB. 4\nC.  5\nD. six\nAnswer:",
            ["A", "B", "C", "D"],
            1,
        ),
        (
            "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
            "Who?\nStatement 1 | He.\nA. a\nB. b\nC. c\nD. d\nAnswer:",
            ["A", "B", "C", "D"],
            3,
        ),
    ],
    "hellaswag": [
        (
            "Roof shingle removal: A man is sitting on a roof. He",
            ["is using wrap.", "is ripping tiles off.", "holds a cube.", "starts pulling."],
            3,
        ),
        (
            "Home and Garden: How to fix a door. Buy a hinge. Measure it. ",
            [" Saw. Go on.", "Paint it.", "Sell door.", "A. b  c."],
            0,
        ),
    ],
}
# The evaluated split's place in the hub's repository, and a split that is not evaluated.
HUB_FILES = {
    "boolq": ("boolq/validation-00000-of-00001.parquet", "boolq/train-00000-of-00001.parquet"),
    "arc_challenge": ("ARC-Challenge/test-00000-of-00001.parquet", "ARC-Easy/test-00000-of-00001.parquet"),
    "mmlu": ("all/test-00000-of-00001.parquet", "abstract_algebra/test-00000-of-00001.parquet"),
    "hellaswag": ("data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
}
# task -> the same first rows in the plain form.
PLAIN_ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it  raining", "passage": "Rain -- Water falls, {{often}}.  ", "label": True},
    "arc_challenge": {"question": "Which is hot?", "choices": ["ice", "the sun", 'it\'s "snow"'], "answer": 1},
    "mmlu": HUB_ROWS["mmlu"][0],
    "hellaswag": {
        "question": "Roof shingle removal: A man is sitting on a roof. He",
        "choices": ["is using wrap.", "is  ripping tiles off.", "holds a [red] cube.", "starts pulling."],
        "answer": 3,
    },
}


def rendered(questions: list[Question]) -> list[tuple[str, list[str], int]]:
    return [(question.context, list(question.choices), question.gold) for question in questions]


@pytest.mark.parametrize("task", CHOICES)
def test_prompts_are_the_harness_s(task: str, tmp_path: Path) -> None:
    evaluated, other = HUB_FILES[task]
    write(tmp_path / other, HUB_ROWS[task][:1] * 5)
    write(tmp_path / evaluated, HUB_ROWS[task])
    assert rendered(read_questions(task, tmp_path)) == RENDERED[task]
    assert rendered(read_questions(task, tmp_path / evaluated)) == RENDERED[task]
    lines = write(tmp_path / "lines" / Path(evaluated).with_suffix(".jsonl"), HUB_ROWS[task])
    assert rendered(read_questions(task, tmp_path / "lines")) == rendered(read_questions(task, lines)) == RENDERED[task]


@pytest.mark.parametrize("task", CHOICES)
def test_the_plain_form_gives_the_same_prompts(task: str, tmp_path: Path) -> None:
    assert rendered(read_questions(task, write(tmp_path / "rows.jsonl", [PLAIN_ROWS[task]]))) == RENDERED[task][:1]


def test_other_layouts_of_boolq_and_mmlu(tmp_path: Path) -> None:
    row = {"question": "is it  raining", "passage": "Rain -- Water falls, {{often}}.  ", "answer": True}
    write(tmp_path / "google/data/validation-00000-of-00001.parquet", [row])
    assert rendered(read_questions("boolq", tmp_path / "google")) == RENDERED["boolq"][:1]
    for row in HUB_ROWS["mmlu"]:
        write(tmp_path / f"mmlu/{row['subject']}/test-00000-of-00001.parquet", [row])
        write(tmp_path / f"mmlu/{row['subject']}/dev-00000-of-00001.parquet", [row] * 3)
    assert rendered(read_questions("mmlu", tmp_path / "mmlu")) == RENDERED["mmlu"]


@pytest.mark.parametrize("task", CHOICES)
def test_tokens_are_cut_as_the_harness_cuts_them(task: str, tmp_path: Path, smollm2: Path) -> None:
    lines: list[str] = []
    source = write(tmp_path / "rows.jsonl", HUB_ROWS[task])
    samples = build(choice(task), source, smollm2, "name", into(lines))
    assert lines == ["test"]
    assert set(samples) == {"test"}
    tokenizer = tokenizer_of(smollm2)
    for sample in samples["test"]:
        row = json.loads(sample.meta)["row"]
        context, choices, gold = RENDERED[task][row]
        # lm-eval 0.4.13, TemplateLM._encode_pair: the context without its trailing space, then the rest of the whole.
        alone = tokenizer.encode(context.rstrip())
        expected = [tokenizer.encode(f"{context} {choice}")[len(alone) :] for choice in choices]
        assert sample.choices == tuple(map(tuple, expected))
        assert sample.input_ids == (*alone, *expected[gold])
        assert (sample.prompt_len, sample.gold, sample.answers) == (len(alone), gold, tuple(choices))
        assert tokenizer.decode([*alone, *expected[gold]], skip_special_tokens=True) == f"{context} {choices[gold]}"
        assert sample.ask == ("choice",)
        assert (sample.benchmark, sample.split, sample.max_new_tokens, sample.question_start) == (
            "name",
            "test",
            0,
            None,
        )
        assert sample.task == (HUB_ROWS["mmlu"][row]["subject"] if task == "mmlu" else "name")
    assert len({sample.sample_id for sample in samples["test"]}) == 2


def test_a_late_question_begins_behind_the_passage(tmp_path: Path, without_bos: Path) -> None:
    source = write(tmp_path / "rows.jsonl", HUB_ROWS["boolq"])
    early, late = (build(choice("boolq", late_question=late), source, without_bos)["test"] for late in (False, True))
    tokenizer = tokenizer_of(without_bos)
    for before, sample in zip(early, late, strict=True):
        assert sample.input_ids == before.input_ids
        row = HUB_ROWS["boolq"][json.loads(sample.meta)["row"]]
        assert sample.question_start is not None
        assert tokenizer.decode(sample.input_ids[: sample.question_start]) == row["passage"]
        question = tokenizer.decode(sample.input_ids[sample.question_start : sample.prompt_len])
        assert question == f"\nQuestion: {row['question']}?\nAnswer:"


def test_a_tokenizer_s_own_first_token_is_kept(tmp_path: Path, without_bos: Path, with_bos: Path) -> None:
    source = write(tmp_path / "rows.jsonl", HUB_ROWS["boolq"])
    start = tokenizer_of(with_bos).convert_tokens_to_ids("<|im_start|>")
    without, with_it = (
        build(choice("boolq", late_question=True), source, model)["test"] for model in (without_bos, with_bos)
    )
    for plain, sample in zip(without, with_it, strict=True):
        assert sample.input_ids == (start, *plain.input_ids)
        assert sample.choices == plain.choices
        assert plain.question_start is not None
        assert (sample.prompt_len, sample.question_start) == (plain.prompt_len + 1, plain.question_start + 1)


def test_subjects_take_turns(tmp_path: Path, smollm2: Path) -> None:
    sizes = {"anatomy": 2, "virology": 9, "sociology": 9}
    rows = [
        {"question": f"{subject} {number}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": number % 4}
        for subject, size in sizes.items()
        for number in range(size)
    ]
    source = write(tmp_path / "rows.jsonl", rows)

    def drawn(test: int, seed: int = 1) -> list[int]:
        samples = build(choice("mmlu", test, seed=seed), source, smollm2)["test"]
        return [json.loads(sample.meta)["row"] for sample in samples]

    for test, expected in ((7, [2, 2, 3]), (10, [2, 4, 4]), (20, [2, 9, 9])):
        found = drawn(test)
        assert len(set(found)) == test
        assert sorted(Counter(rows[row]["subject"] for row in found).values()) == expected
    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(7, seed=2)


@pytest.mark.parametrize(
    ("task", "rows", "changes", "message"),
    [
        (
            "boolq",
            [{"question": "a", "label": 1}],
            {},
            "row 0 lacks the column 'passage'; .* columns of aps/super_glue",
        ),
        ("boolq", [{"question": "a", "passage": "b"}], {}, "row 0 lacks the column 'answer'"),
        ("boolq", [{"question": "a", "passage": "b", "label": -1}], {}, "row 0 has no right answer"),
        ("arc_challenge", [{"question": "a", "choices": ["b"]}], {}, "row 0 lacks the column 'answer'"),
        ("arc_challenge", [HUB_ROWS["arc_challenge"][0] | {"answerKey": "Z"}], {}, "row 0 is no row of arc_challenge"),
        ("mmlu", [HUB_ROWS["mmlu"][0] | {"choices": ["a"]}], {}, "row 0 is no row of mmlu"),
        ("mmlu", [{"question": "a"}], {}, "row 0 lacks the column 'subject'"),
        ("hellaswag", [HUB_ROWS["hellaswag"][0] | {"label": ""}], {}, "row 0 is no row of hellaswag"),
        ("hellaswag", HUB_ROWS["hellaswag"][:1], {}, "benchmarks.x: the source has 1 rows, 2 are wanted; lower sizes"),
        ("mmlu", HUB_ROWS["mmlu"], {"late_question": True}, "benchmarks.x: mmlu has no text before its question"),
        ("arc_challenge", HUB_ROWS["arc_challenge"], {"late_question": True}, "set late_question to false"),
        ("hellaswag", HUB_ROWS["hellaswag"], {"late_question": True}, "set late_question to false"),
    ],
)
def test_unusable_rows_are_one_sentence(
    task: str, rows: list[dict[str, Any]], changes: dict[str, Any], message: str, tmp_path: Path, smollm2: Path
) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        build(choice(task, **changes), write(tmp_path / "rows.jsonl", rows), smollm2, "x")
    assert "\n" not in str(caught.value)


def test_a_directory_without_the_evaluated_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "boolq/train-00000-of-00001.parquet", HUB_ROWS["boolq"])
    with pytest.raises(PipelineError, match=r"holds none of boolq/validation\*, .* like aps/super_glue"):
        read_questions("boolq", tmp_path)


def test_a_choice_gets_its_own_tokens_behind_an_appended_end(tmp_path: Path) -> None:
    words = " ".join(f"t{i}" for i in range(30)) + " Question: t5? Answer: no yes"
    model = tiny.save(tiny.word_tokenizer(words, "<s> $A </s>"), tmp_path / "model")
    row = {"question": "t5", "passage": " ".join(f"t{i}" for i in range(6, 26)), "label": 1}
    source = write(tmp_path / "rows.jsonl", [row] * 4)
    for late in (False, True):
        for sample in build(choice("boolq", 4, late_question=late), source, model)["test"]:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
            assert sample.choices == tuple((tokenizer.convert_tokens_to_ids(word),) for word in ("no", "yes"))
            assert sample.input_ids[: sample.prompt_len][-1] == tokenizer.convert_tokens_to_ids("Answer:")
            assert sample.question_start == (21 if late else None)
    # A vocabulary without the answers cannot choose between them.
    poor = tiny.save(tiny.word_tokenizer("t5 t6", "<s> $A </s>"), tmp_path / "poor")
    with pytest.raises(
        PipelineError, match=r"benchmarks\.boolq: row \d: the tokenizer gives every choice the same tokens"
    ):
        build(choice("boolq", 4), source, poor, "boolq")


def scored(task: str, nll: list[float], answers: list[str], gold: int | None) -> dict[str, float]:
    choices = tuple((index,) for index in range(len(answers)))
    sample = Sample("s", task, task, "test", (1, 2), 1, None, tuple(answers), 0, "{}", ("choice",), (), choices, gold)
    return choice(task).score(sample, Answer(nll=nll))


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("boolq", "accuracy"),
        ("arc_challenge", "accuracy"),
        ("mmlu", "accuracy"),
        ("hellaswag", "accuracy_norm"),
    ],
)
def test_accuracy_is_the_one_that_the_harness_reports(task: str, metric: str) -> None:
    right = 2 if metric == "accuracy_norm" else 1
    for gold in range(3):
        assert scored(task, [3.0, 2.0, 4.0], ["a", "b", "longer"], gold) == {metric: float(gold == right)}


@pytest.mark.parametrize("task", CHOICES)
@pytest.mark.parametrize(
    ("nll", "gold"), [([1.0], 0), ([1.0, 2.0, 3.0], 0), ([], 0), ([1.0, 2.0], 2), ([1.0, 2.0], -1)]
)
def test_likelihoods_that_are_not_the_choices_are_refused(task: str, nll: list[float], gold: int) -> None:
    with pytest.raises(PipelineError, match=f"2 choices have {len(nll)} likelihoods, choice {gold} is right"):
        scored(task, nll, ["a", "b"], gold)


def test_a_sample_without_a_right_choice_is_refused() -> None:
    with pytest.raises(PipelineError, match="Sample s has no right choice"):
        scored("boolq", [1.0], ["a"], None)
