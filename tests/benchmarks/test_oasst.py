"""OpenAssistant: from the published schemas to threads and dialogues."""

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.benchmarks.oasst import Oasst, Thread, assign_trees, english_threads, read_messages
from pipeline.errors import PipelineError
from pipeline.samples.sample import SPLITS
from tests.benchmarks.making import build, tokenizer_of, write

WORDS = ("the", "cache", "keeps", "what", "later", "tokens", "look", "at", "and", "forgets", "the", "rest")


def params(**changes: Any) -> Oasst:
    return Oasst(
        **{
            "kind": "oasst",
            "source": "messages",
            "length": 400,
            "max_reply_tokens": 32,
            "sizes": {"train": 4, "validation": 1, "test": 2},
            "seed": 1,
        }
        | changes
    )


def message(
    name: str, parent: str | None, tree: str, role: str, text: str | None = None, **more: Any
) -> dict[str, Any]:
    content = {"message_id": name, "parent_id": parent, "message_tree_id": tree, "role": role, "lang": "en"}
    return content | {"text": text or f"words of {name}", "deleted": False, "rank": None} | more


def tree(number: int) -> list[dict[str, Any]]:
    """Two turns each way; sizes differ from tree to tree."""
    name = f"t{number}"
    text = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(12 + number % 9))
    return [
        message(f"{name}-a", None, name, "prompter", f"{text} {number}?"),
        message(f"{name}-b", f"{name}-a", name, "assistant", f"{text}, yes."),
        message(f"{name}-c", f"{name}-b", name, "prompter", f"and {number}?"),
        message(f"{name}-d", f"{name}-c", name, "assistant", f"{number} too, {' '.join(WORDS[:3])}."),
    ]


def nested(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same tree in the schema of nested replies, which repeats neither tree nor the root's parent."""

    def fold(row: dict[str, Any]) -> dict[str, Any]:
        replies = [fold(reply) for reply in rows if reply["parent_id"] == row["message_id"]]
        return {k: v for k, v in row.items() if k not in ("message_tree_id", "parent_id")} | {"replies": replies}

    return {"message_tree_id": rows[0]["message_tree_id"], "prompt": fold(rows[0])}


ROWS = [row for number in range(60) for row in tree(number)]


def test_all_published_layouts_give_the_same_threads(tmp_path: Path) -> None:
    expected = english_threads(read_messages(write(tmp_path / "messages.jsonl", ROWS)))
    assert len(expected) == 60
    trees = write(tmp_path / "trees.jsonl", [nested(tree(number)) for number in range(60)])
    packed = tmp_path / "hub/2023-11-05_oasst2_ready.messages.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((tmp_path / "messages.jsonl").read_bytes()))
    parquet = tmp_path / "parquet"
    (parquet / "data").mkdir(parents=True)
    pl.DataFrame(ROWS[:120]).write_parquet(parquet / "data/train-00000-of-00001.parquet")
    pl.DataFrame(ROWS[120:]).write_parquet(parquet / "data/validation-00000-of-00001.parquet")
    for source in (trees, packed, packed.parent, parquet):
        assert sorted(english_threads(read_messages(source)), key=lambda thread: thread.leaf) == sorted(
            expected, key=lambda thread: thread.leaf
        ), source


def test_a_column_that_one_file_of_several_lacks_is_named_with_that_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pl.DataFrame(ROWS[:120]).write_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    lacking = tmp_path / "data/validation-00000-of-00001.parquet"
    # Otherwise its replies would answer nothing, and be left out without a word.
    pl.DataFrame(ROWS[120:]).drop("parent_id").write_parquet(lacking)
    with pytest.raises(PipelineError, match=f"{lacking}: some rows lack parent_id; the source must follow OASST2"):
        read_messages(tmp_path)


def test_a_thread_follows_the_best_replies_and_every_prompt() -> None:
    rows = [
        message("a", None, "t", "prompter"),
        message("worse", "a", "t", "assistant", rank=1),
        message("best", "a", "t", "assistant", rank=0),
        message("unranked", "a", "t", "assistant"),
        message("p1", "best", "t", "prompter"),
        message("p2", "best", "t", "prompter"),
        message("r1", "p1", "t", "assistant"),
        message("r2", "p2", "t", "assistant"),
        message("after worse", "worse", "t", "prompter"),
    ]
    threads = english_threads(rows)
    assert {thread.leaf for thread in threads} == {"r1", "r2"}
    for thread in threads:
        assert [turn["role"] for turn in thread.turns] == ["user", "assistant", "user", "assistant"]
        assert thread.turns[1]["content"] == "words of best"


@pytest.mark.parametrize(
    ("rows", "leaves"),
    [
        ([message("a", None, "t", "prompter")], set()),  # nobody answered
        ([message("a", None, "t", "prompter", lang="de"), message("b", "a", "t", "assistant")], set()),
        ([message("a", None, "t", "prompter"), message("b", "a", "t", "assistant", deleted=True)], set()),
        ([message("a", None, "t", "prompter"), message("b", "a", "t", "assistant", text="  ")], set()),
        # A last prompt without an answer: what came before it is a thread.
        (
            [
                message("a", None, "t", "prompter"),
                message("b", "a", "t", "assistant"),
                message("c", "b", "t", "prompter"),
            ],
            {"b"},
        ),
    ],
)
def test_what_cannot_end_in_a_reply_is_left_out(rows: list[dict[str, Any]], leaves: set[str]) -> None:
    assert {thread.leaf for thread in english_threads(rows)} == leaves


def test_trees_are_dealt_in_proportion() -> None:
    threads = [Thread(f"t{number}", f"l{number}", ()) for number in range(140)]
    fitting = {f"t{number}" for number in range(0, 140, 2)}
    split_of = assign_trees(threads, fitting, params().sizes, 1)
    assert [list(split_of.values()).count(split) for split in SPLITS] == [80, 20, 40]
    # Trees that can end a dialogue are dealt by themselves.
    assert [sum(split_of[tree] == split for tree in fitting) for split in SPLITS] == [40, 10, 20]
    assert split_of == assign_trees(threads[::-1], fitting, params().sizes, 1)


def test_dialogues_have_the_length_and_share_no_tree(tmp_path: Path, smollm2: Path) -> None:
    source = write(tmp_path / "messages.jsonl", ROWS)
    samples = build(params(), source, smollm2, "oasst2")
    assert {split: len(rows) for split, rows in samples.items()} == {"train": 4, "validation": 1, "test": 2}
    tokenizer = tokenizer_of(smollm2)
    seen: dict[str, str] = {}
    for split, rows in samples.items():
        for sample in rows:
            assert 360 <= len(sample.input_ids) <= 400
            assert (sample.benchmark, sample.task, sample.split) == ("oasst2", "oasst2", split)
            assert sample.ask == (("likelihood",) if split == "test" else ())
            leaves = json.loads(sample.meta)["threads"]
            trees = {leaf.split("-")[0] for leaf in leaves}
            assert len(trees) == len(leaves) > 3
            for name in trees:
                assert seen.setdefault(name, split) == split
            text = tokenizer.decode(sample.input_ids)
            assert text.count("<|im_start|>user") == 2 * len(leaves)
            number = leaves[-1].split("-")[0][1:]
            reply = tokenizer.decode(sample.input_ids[sample.prompt_len :])
            assert reply == f"{number} too, {' '.join(WORDS[:3])}.<|im_end|>"
    assert build(params(), source, smollm2, "oasst2") == samples


def test_a_base_model_s_dialogues_are_transcripts(tmp_path: Path, base_model: Path) -> None:
    (sample, *_) = build(params(), write(tmp_path / "messages.jsonl", ROWS), base_model)["test"]
    assert 360 <= len(sample.input_ids) <= 400
    tokenizer = tokenizer_of(base_model)
    leaves = json.loads(sample.meta)["threads"]
    turns = [turn for leaf in leaves for turn in tree(int(leaf.split("-")[0][1:]))]
    lines = [f"{'User' if turn['role'] == 'prompter' else 'Assistant'}: {turn['text']}" for turn in turns]
    assert tokenizer.decode(sample.input_ids) == "<|im_start|>" + "\n\n".join(lines)
    assert tokenizer.decode(sample.input_ids[sample.prompt_len :]) == f" {turns[-1]['text']}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 8000}, "oasst2: only 0 threads make a train dialogue of about 8000 tokens, 4 are wanted"),
        ({"max_reply_tokens": 2}, "oasst2: only 0 threads make a train dialogue"),
    ],
)
def test_too_few_threads_is_one_sentence(changes: dict[str, Any], message: str, tmp_path: Path, smollm2: Path) -> None:
    # Of 14 trees, since each is tried with all the others.
    source = write(tmp_path / "messages.jsonl", [row for number in range(14) for row in tree(number)])
    with pytest.raises(PipelineError, match=message):
        build(params(**changes), source, smollm2, "oasst2")


def test_unusable_sources_are_one_sentence(tmp_path: Path) -> None:
    cases = {
        "no such file": (tmp_path / "none.jsonl", "cannot be read as rows"),
        "no json": (tmp_path / "bad.jsonl", "cannot be read as rows"),
        "no objects": (write(tmp_path / "list.jsonl", [[1, 2]]), "every line must be a JSON object"),  # type: ignore[list-item]
        "empty": (write(tmp_path / "empty.jsonl", []), "holds no messages"),
        "no columns": (write(tmp_path / "columns.jsonl", [{"text": "a"}]), "lack message_id, parent_id"),
        "torn archive": (tmp_path / "torn.jsonl.gz", "cannot be read as rows"),
        "no data": (tmp_path / "folder", "holds neither data/"),
    }
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-20])
    (tmp_path / "folder").mkdir()
    for source, message in cases.values():
        with pytest.raises(PipelineError, match=message) as caught:
            read_messages(source)
        assert str(source) in str(caught.value)
