"""Small files of every data set in the hub's own formats: names, columns and types are theirs, the text is another.

A future profile's data set is one more function of ``HUB``.
"""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
# Rows of a split: enough for what a rehearsal keeps of the sizes.
_ROWS = 8
_STRINGS = pa.list_(pa.string())


class Words:
    """Pieces of a text, one after the other, each other than the last."""

    def __init__(self, text: str) -> None:
        self._words: Iterator[str] = iter(text.split())

    def __call__(self, count: int) -> str:
        """The next words."""
        taken = list(islice(self._words, count))
        assert len(taken) == count, "the text is too short"
        return " ".join(taken)


def _write(path: Path, rows: list[Row], schema: dict[str, pa.DataType]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(schema)), path)


def _boolq(folder: Path, words: Words) -> None:
    schema = {"question": pa.string(), "passage": pa.string(), "idx": pa.int32(), "label": pa.int64()}
    for split in ("train", "validation"):
        rows = [
            {"question": words(8).lower(), "passage": words(110), "idx": row, "label": row % 2} for row in range(_ROWS)
        ]
        _write(folder / f"boolq/{split}-00000-of-00001.parquet", rows, schema)
    # Its test split is published without answers.
    unanswered = [row | {"label": -1} for row in rows]
    _write(folder / "boolq/test-00000-of-00001.parquet", unanswered, schema)


def _arc(folder: Path, words: Words) -> None:
    schema = {
        "id": pa.string(),
        "question": pa.string(),
        "choices": pa.struct({"text": _STRINGS, "label": _STRINGS}),
        "answerKey": pa.string(),
    }
    for part in ("ARC-Challenge", "ARC-Easy"):
        for split in ("train", "validation", "test"):
            rows = []
            for row in range(_ROWS):
                labels = list("ABCD" if row % 2 else "1234")  # both are there
                choices = {"text": [words(4) for _ in labels], "label": labels}
                rows.append({"id": f"X_{row}", "question": words(30), "choices": choices, "answerKey": labels[row % 4]})
            _write(folder / f"{part}/{split}-00000-of-00001.parquet", rows, schema)


def _mmlu(folder: Path, words: Words) -> None:
    schema = {"question": pa.string(), "subject": pa.string(), "choices": _STRINGS, "answer": pa.int64()}

    def rows(subject: str) -> list[Row]:
        return [
            {"question": words(30), "subject": subject, "choices": [words(4) for _ in range(4)], "answer": row % 4}
            for row in range(_ROWS // 2)
        ]

    subjects = ("abstract_algebra", "world_religions")
    for split in ("test", "validation", "dev"):
        by_subject = {subject: rows(subject) for subject in subjects}
        for name, found in by_subject.items():
            _write(folder / f"{name}/{split}-00000-of-00001.parquet", found, schema)
        _write(
            folder / f"all/{split}-00000-of-00001.parquet", [*by_subject[subjects[0]], *by_subject[subjects[1]]], schema
        )
    _write(folder / "all/auxiliary_train-00000-of-00001.parquet", rows(""), schema)


def _hellaswag(folder: Path, words: Words) -> None:
    schema = {
        "ind": pa.int32(),
        "activity_label": pa.string(),
        "ctx_a": pa.string(),
        "ctx_b": pa.string(),
        "ctx": pa.string(),
        "endings": _STRINGS,
        "source_id": pa.string(),
        "split": pa.string(),
        "split_type": pa.string(),
        "label": pa.string(),
    }
    for split in ("train", "validation", "test"):
        rows = []
        for row in range(_ROWS):
            start, rest = words(30), words(3).lower() if row % 2 else ""
            rows.append(
                {
                    "ind": row,
                    "activity_label": words(2),
                    "ctx_a": start,
                    "ctx_b": rest,
                    "ctx": f"{start} {rest}",
                    "endings": [f"[step] {words(9)}" for _ in range(4)],
                    "source_id": f"activitynet~v_{row}",
                    "split": split,
                    "split_type": "indomain",
                    "label": "" if split == "test" else str(row % 4),
                }
            )
        _write(folder / f"data/{split}-00000-of-00001.parquet", rows, schema)


def _oasst2(folder: Path, words: Words) -> None:
    scores = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")
    schema = {
        "message_id": pa.string(),
        "parent_id": pa.string(),
        "user_id": pa.string(),
        "created_date": pa.string(),
        "text": pa.string(),
        "role": pa.string(),
        "lang": pa.string(),
        "review_count": pa.int32(),
        "review_result": pa.bool_(),
        "deleted": pa.bool_(),
        "rank": pa.int32(),
        "synthetic": pa.bool_(),
        "model_name": pa.string(),
        "detoxify": pa.struct(dict.fromkeys(scores, pa.float64())),
        "message_tree_id": pa.string(),
        "tree_state": pa.string(),
        "emojis": pa.struct({"name": _STRINGS, "count": pa.list_(pa.int32())}),
        "labels": pa.struct({"name": _STRINGS, "value": pa.list_(pa.float64()), "count": pa.list_(pa.int32())}),
    }

    def message(tree: int, name: str, parent: str | None, length: int, lang: str) -> Row:
        prompter = parent is None or parent.endswith("reply")
        return {
            **dict.fromkeys(schema),
            "message_id": f"{tree:03d}-{name}",
            "parent_id": None if parent is None else f"{tree:03d}-{parent}",
            "user_id": "u",
            "created_date": "2023-02-05T14:23:50.983374+00:00",
            "text": words(length),
            "role": "prompter" if prompter else "assistant",
            "lang": lang,
            "review_count": 3,
            "review_result": True,
            "deleted": False,
            "synthetic": False,
            "rank": None if prompter else int(name[0] == "w"),
            "message_tree_id": f"{tree:03d}-prompt",
            "tree_state": "ready_for_export",
            "labels": {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]},
        }

    def tree(number: int) -> list[Row]:
        lang = "es" if number % 5 == 4 else "en"
        return [
            message(number, "prompt", None, 30, lang),
            message(number, "reply", "prompt", 90, lang),
            message(number, "worse-reply", "prompt", 90, lang),
            message(number, "next", "reply", 30, lang),
            message(number, "last-reply", "next", 60, lang),
        ]

    trees = [tree(number) for number in range(140)]
    for split, held in (("train", trees[:120]), ("validation", trees[120:])):
        _write(folder / f"data/{split}-00000-of-00001.parquet", [row for rows in held for row in rows], schema)
    # The same once more, as the project that collected them gives them out.
    lines = "".join(json.dumps(row) + "\n" for rows in trees for row in rows)
    (folder / "2023-11-05_oasst2_ready.messages.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def _longbench(folder: Path, words: Words) -> None:
    tasks = {"gov_report": 2500, "passage_retrieval_en": 1500, "narrativeqa": 600}
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for task, length in tasks.items():
            rows = [
                {
                    "input": "" if task == "gov_report" else words(30),
                    "context": words(length),
                    "answers": ["Paragraph 3" if task == "passage_retrieval_en" else words(20)],
                    "length": length,
                    "dataset": task,
                    "language": "en",
                    "all_classes": None,
                    "_id": f"{task}{row}",
                }
                for row in range(2)
            ]
            archive.writestr(f"data/{task}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (folder / "LongBench.py").write_text("raise SystemExit('code of a repository is never run')\n")


HUB: dict[str, Callable[[Path, Words], None]] = {
    "aps/super_glue": _boolq,
    "allenai/ai2_arc": _arc,
    "cais/mmlu": _mmlu,
    "Rowan/hellaswag": _hellaswag,
    "OpenAssistant/oasst2": _oasst2,
    "THUDM/LongBench": _longbench,
}
