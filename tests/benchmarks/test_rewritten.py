"""Rows as other tools leave them: every reader takes a value for what it was, or names file, row and column.

What keeps this is one mechanism, the row models of ``pipeline/samples/rows.py``; here are inputs that pandas, Excel,
polars, DuckDB, jq and Windows tools make of the data sets that the readers know.
"""

import gzip
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.benchmarks import dialogues
from pipeline.benchmarks.longbench import read_documents
from pipeline.benchmarks.oasst import english_threads, read_messages
from pipeline.errors import PipelineError
from pipeline.ruler.generator import checked_rows
from pipeline.samples.rows import read_rows
from tests.benchmarks.making import CHOICES, read_pairs, read_questions, write
from tests.benchmarks.test_choice import HUB_ROWS, PLAIN_ROWS
from tests.benchmarks.test_dialogues import ROW, source
from tests.benchmarks.test_longbench import row as longbench_row
from tests.benchmarks.test_oasst import message, nested, tree

NAN = math.nan
DROP = object()
ARC, PLAIN_ARC = HUB_ROWS["arc_challenge"][0], PLAIN_ROWS["arc_challenge"]
STRUCTURES = [{"text": text, "label": label} for text, label in zip(*ARC["choices"].values(), strict=True)]


def changed(row: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (row | changes).items() if value is not DROP}


def only(error: pytest.ExceptionInfo[PipelineError]) -> str:
    """The error, which is one line that Unix can print."""
    text = str(error.value)
    assert "\n" not in text
    text.encode()
    return text


@pytest.mark.parametrize(
    ("task", "form", "changes", "gold"),
    [
        *[("boolq", "hub", {"label": label}, 1) for label in (True, 1, 1.0, "1", "1.0", "true", "True", "TRUE", "yes")],
        *[("boolq", "hub", {"label": label}, 0) for label in (False, 0, 0.0, -0.0, "0", "false", "False", "No")],
        *[("boolq", "hub", {"label": null, "answer": False}, 0) for null in (None, NAN, DROP)],
        ("boolq", "hub", {"label": 1, "answer": "true"}, 1),
        ("arc_challenge", "hub", {"choices": STRUCTURES}, 1),
        ("arc_challenge", "hub", {"answerKey": 2}, 1),
        ("arc_challenge", "hub", {"answerKey": 2.0}, 1),
        ("arc_challenge", "hub", {"choices": ARC["choices"] | {"label": [1, 2, 3]}}, 1),
        *[("arc_challenge", "plain", {"answer": answer}, 1) for answer in (1, 1.0, "B")],
        *[("mmlu", "plain", {"answer": answer}, 2) for answer in (2, 2.0, "2", "2.0", "C")],
        *[("hellaswag", "hub", {"label": label}, 2) for label in (2, 2.0, "2", "2.0")],
        *[("hellaswag", "plain", {"answer": answer}, 2) for answer in (2, 2.0, "2", "C")],
        # Tables of both forms, joined.
        ("hellaswag", "plain", {"ctx_a": None, "ctx_b": NAN, "endings": None, "label": NAN}, 3),
    ],
)
def test_an_answer_in_another_spelling_is_the_same(
    task: str, form: str, changes: dict[str, Any], gold: int, tmp_path: Path
) -> None:
    row = changed((HUB_ROWS[task] if form == "hub" else [PLAIN_ROWS[task]])[0], changes)
    (question,) = read_questions(task, write(tmp_path / "rows.jsonl", [row]))
    assert (question.gold, type(question.gold)) == (gold, int)
    # The harness is given the same.
    ((given, _),) = read_pairs(task, tmp_path / "rows.jsonl")
    (again,) = read_questions(task, write(tmp_path / "again.jsonl", [given]))
    assert again == question


@pytest.mark.parametrize("null", [None, NAN])
def test_an_empty_half_of_a_context_that_became_null_is_empty(null: Any, tmp_path: Path) -> None:
    row = HUB_ROWS["hellaswag"][1]
    expected = read_questions("hellaswag", write(tmp_path / "rows.jsonl", [row]))
    assert read_questions("hellaswag", write(tmp_path / "null.jsonl", [row | {"ctx_b": null}])) == expected


@pytest.mark.parametrize(
    ("task", "form", "changes", "message"),
    [
        *[("boolq", "hub", {"label": label}, "no right answer") for label in (-1, 2, "-1", -1.0)],
        *[("boolq", "hub", {"label": label}, "answer") for label in (0.5, "", " ", "1 ", "nan", "B", [1], math.inf)],
        ("boolq", "hub", {"label": NAN}, "lacks the column 'answer'|answer: it has no value"),
        ("boolq", "hub", {"label": 1, "answer": False}, "its label and its answer differ"),
        *[("boolq", "hub", {"passage": bad}, "passage") for bad in (None, NAN, DROP, "", " \n", 3, ["a"], "\ud800")],
        *[("arc_challenge", "hub", {"answerKey": bad}, "answerKey") for bad in (None, NAN, "", "B", "4", 0, True)],
        ("arc_challenge", "hub", {"choices": "{'text': array(['ice'])}"}, "choices: it should be a valid list"),
        ("arc_challenge", "hub", {"choices": STRUCTURES[:2] * 2}, "one text and one label of its own"),
        ("arc_challenge", "hub", {"choices": {"text": ["a", "b"], "label": ["1", "2", "3"]}}, "one text and one label"),
        ("arc_challenge", "hub", {"choices": {"text": ["a", None], "label": ["1", "2"]}}, "choices.text.1"),
        # A text is no list of letters.
        *[("arc_challenge", "plain", {"choices": bad}, "choices") for bad in ("abcd", '["a","b"]', "['a' 'b']", None)],
        # ARC labels some rows from 1.
        *[("arc_challenge", "plain", {"answer": bad}, "numbers as text may be") for bad in ("1", "4", "a", "")],
        *[("arc_challenge", "plain", {"answer": bad}, "answer") for bad in (NAN, None, True, 0.5, [1])],
        *[("arc_challenge", "plain", {"answer": bad}, "no right answer") for bad in (-1, 3, -1.0, "D")],
        *[("mmlu", "plain", {"answer": bad}, "no right answer") for bad in (-1, 4, "4", "E")],
        *[("mmlu", "plain", {"answer": bad}, "answer") for bad in (True, False, NAN, "b", "1,0", "１", "0x1")],
        *[
            ("mmlu", "plain", {"choices": bad}, "choices")
            for bad in ("abcd", ["a"] * 5, ["a", "b", "c", None], [1] * 4)
        ],
        *[("mmlu", "plain", {"subject": bad}, "subject") for bad in (None, "", 3, DROP)],
        *[("hellaswag", "hub", {"label": bad}, "label") for bad in ("", NAN, DROP, "two", True)],
        *[("hellaswag", "hub", {"label": bad}, "no right answer") for bad in (-1, "4")],
        *[("hellaswag", "hub", {"endings": bad}, "endings") for bad in ("abcd", None, [1, 2], ["a", NAN])],
        ("hellaswag", "hub", {"ctx_b": DROP}, "lacks the column 'ctx_b'"),
        ("hellaswag", "plain", {"answer": -1}, "no right answer"),
    ],
)
def test_an_answer_that_is_none_is_refused(
    task: str, form: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = (HUB_ROWS[task] if form == "hub" else [PLAIN_ROWS[task]])[0]
    path = write(tmp_path / "rows.jsonl", [good, changed(good, changes)])
    with pytest.raises(PipelineError, match=message) as caught:
        read_questions(task, path)
    assert only(caught).startswith(f"{path}, line 2: row 1 ")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    task=st.sampled_from(sorted(CHOICES)),
    value=st.none() | st.booleans() | st.integers(-3, 6) | st.floats()
    | st.text("0123456789.-+eABCDtruefals \ud800", max_size=5)
    | st.lists(st.integers(0, 3), max_size=2) | st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    column=st.integers(0, 9),
)  # fmt: skip
def test_whatever_stands_in_a_column_is_read_right_or_refused(
    task: str, value: Any, column: int, tmp_path: Path
) -> None:
    for good in (HUB_ROWS[task][0], PLAIN_ROWS[task]):
        name = sorted(good)[column % len(good)]
        path = write(tmp_path / "rows.jsonl", [good | {name: value}])
        try:
            (question,) = read_questions(task, path)
        except PipelineError:
            continue
        (expected,) = read_questions(task, write(tmp_path / "good.jsonl", [good]))
        if name in ("label", "answer", "answerKey"):
            # Only a value that names this choice gives it.
            labels = good["choices"]["label"] if name == "answerKey" else None
            letters = "ABCD"[question.gold] if task != "boolq" else ("no", "yes")[question.gold]
            allowed = (
                {labels[question.gold]} if labels else {str(question.gold), letters, str(bool(question.gold)).lower()}
            )
            spelled = str(value).lower() if task == "boolq" else str(value)
            assert spelled in allowed or float(value) == float(labels[question.gold] if labels else question.gold)
        else:
            assert question.gold == expected.gold


TREE = tree(1)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0.0, "deleted": 0},
        {"rank": "0", "deleted": "False"},
        {"rank": NAN, "deleted": NAN},
        {"rank": DROP, "deleted": DROP},
        {"deleted": None, "review": {"count": NAN}},
    ],
)
def test_messages_in_other_spellings_make_the_same_threads(change: dict[str, Any], tmp_path: Path) -> None:
    expected = english_threads(read_messages(write(tmp_path / "rows.jsonl", TREE)))
    assert len(expected) == 1
    for root in (None, NAN, "", DROP):
        rows = [changed(row, change | ({"parent_id": root} if row["parent_id"] is None else {})) for row in TREE]
        assert english_threads(read_messages(write(tmp_path / "change.jsonl", rows))) == expected
    folded = nested([changed(row, change) for row in TREE])
    folded["prompt"]["replies"][0]["replies"][0]["replies"][0]["replies"] = None
    assert english_threads(read_messages(write(tmp_path / "trees.jsonl", [folded]))) == expected


def test_ranks_are_numbers_and_deleted_messages_stay_out_however_they_are_spelled(tmp_path: Path) -> None:
    def leaves(ranks: list[Any], **more: Any) -> set[str]:
        rows = [message("a", None, "t", "prompter")]
        rows += [message(f"r{i}", "a", "t", "assistant", rank=rank, **more) for i, rank in enumerate(ranks)]
        return {thread.leaf for thread in english_threads(read_messages(write(tmp_path / "rows.jsonl", rows)))}

    for ranks in ([10, 9, NAN], ["10", "9", None], [10.0, "9.0", NAN]):
        assert leaves(ranks) == {"r1"}
    for deleted in (True, 1, 1.0, "true", "True", "1"):
        assert leaves([0], deleted=deleted) == set()
    for deleted in (False, 0, 0.0, "false", "False", "0", NAN, None):
        assert leaves([0], deleted=deleted) == {"r0"}


def test_numbered_messages_find_their_parents_after_pandas(tmp_path: Path) -> None:
    # A column of whole numbers with a null in it becomes one of floats.
    rows = [message(1, None, 1, "prompter"), message(2, 1.0, 1.0, "assistant")]  # type: ignore[arg-type]
    (thread,) = english_threads(read_messages(write(tmp_path / "rows.jsonl", rows)))
    assert (thread.tree, thread.leaf) == ("1", "2")


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([*TREE, TREE[1]], "line 5: row 4 repeats the message_id t1-b"),
        ([message("x", "z", "t", "prompter"), message("z", "x", "t", "assistant"), *TREE], "message x answers itself"),
        ([message("x", "x", "t", "prompter"), *TREE], "message x answers itself"),
        ([changed(row, {"parent_id": "nan"}) for row in TREE], "no message begins a tree"),
        ([TREE[0], TREE[1] | {"text": None}], r"line 2: row 1 is no row of OASST .*\(text: it has no value"),
        ([TREE[0], TREE[1] | {"text": 7}], "line 2: row 1 is no row of OASST"),
        ([TREE[0], TREE[1] | {"text": "\ud83d"}], "line 2: row 1 is no row of OASST .* half of a surrogate pair"),
        ([TREE[0], TREE[1] | {"lang": NAN}], "line 2: row 1 is no row of OASST .*lang"),
        ([TREE[0], changed(TREE[1], {"lang": DROP})], "line 2: row 1 lacks the column 'lang'"),
        ([TREE[0], TREE[1] | {"role": "Assistant"}], "line 2: row 1 is no row of OASST .*role"),
        ([TREE[0], TREE[1] | {"deleted": "maybe"}], "line 2: row 1 is no row of OASST .*deleted"),
        ([TREE[0], TREE[1] | {"rank": "best"}], "line 2: row 1 is no row of OASST .*rank"),
        ([TREE[0], TREE[1] | {"message_tree_id": None}], "line 2: row 1 is no row of OASST .*message_tree_id"),
        ([changed(row, {"parent_id": DROP}) for row in TREE], "some rows lack parent_id"),
        ([{"message_tree_id": "t", "prompt": "text"}], "line 1: row 0 is no row of OASST .*prompt"),
        ([{"message_tree_id": None, "prompt": nested(TREE)["prompt"]}], "line 1: row 0 is no row of OASST .*tree_id"),
        ([{"message_tree_id": "t", "prompt": {"replies": "[]"}}], "line 1: row 0 is no row of OASST .*replies"),
        ([{"message_tree_id": "t", "prompt": {"replies": [3]}}], "line 1: row 0 is no row of OASST .*replies"),
    ],
)
def test_messages_that_are_none_are_refused(rows: list[dict[str, Any]], text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(PipelineError, match=text) as caught:
        read_messages(path)
    assert only(caught).startswith(str(path))


def test_a_dialogue_of_any_depth_is_one_thread(tmp_path: Path) -> None:
    roles = ("prompter", "assistant")
    rows = [message(f"m{i}", f"m{i - 1}" if i else None, "t", roles[i % 2]) for i in range(3000)]
    (thread,) = english_threads(read_messages(write(tmp_path / "rows.jsonl", rows)))
    assert len(thread.turns) == 3000


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "replies", "a"]), inner),
    max_leaves=6,
)
READERS: dict[str, tuple[Callable[[Path], Any], list[dict[str, Any]]]] = {
    **{task: (lambda path, task=task: read_questions(task, path), HUB_ROWS[task]) for task in CHOICES},
    "messages": (lambda path: english_threads(read_messages(path)), TREE),
    "trees": (lambda path: english_threads(read_messages(path)), [nested(TREE)]),
    **{
        task: (lambda path, task=task: read_documents(task, path), [longbench_row(task)])
        for task in ("trec", "lcc", "qasper")
    },
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(READERS)),
    changes=st.dictionaries(st.integers(0, 20), ANYTHING, min_size=1, max_size=3),
    inside=st.booleans(),
)
def test_no_reader_ends_in_a_traceback(name: str, changes: dict[int, Any], inside: bool, tmp_path: Path) -> None:
    read, rows = READERS[name]
    rows = json.loads(json.dumps(rows))
    for place, value in changes.items():
        row = rows[place % len(rows)]
        # A tree's columns are those of its messages.
        row = row["prompt"] if inside and isinstance(row.get("prompt"), dict) else row
        row[sorted(row)[place % len(row)]] = value
    path = write(tmp_path / "rows.jsonl", rows)
    try:
        read(path)
    except PipelineError as error:
        text = str(error)
    else:
        return
    assert text.startswith(str(path))
    assert "\n" not in text
    text.encode()


def test_messages_without_their_parent_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*TREE, message("x", "gone", "t", "assistant")])
    assert [thread.leaf for thread in english_threads(read_messages(path))] == ["t1-d"]


@pytest.mark.parametrize(
    ("task", "changes", "text"),
    [
        *[("qasper", {"answers": bad}, "has no answers") for bad in ("Paris", "['a' 'b']", None, NAN, [None], {}, [7])],
        *[("qasper", {"input": bad}, "must be text") for bad in (None, NAN, 7, ["a"], "\ud800")],
        *[("qasper", {"context": bad}, "must be text") for bad in (None, NAN, "", " \n", ["a"])],
        ("gov_report", {"input": 7}, "must be text"),
        *[("trec", {"all_classes": bad}, "all_classes") for bad in ("Date", [], [None], [7], NAN)],
        ("qasper", {"dataset": None}, "this row names no task"),
        ("qasper", {"dataset": DROP}, "this row names no task"),
    ],
)
def test_documents_that_are_none_are_refused(task: str, changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    good = longbench_row(task)
    path = write(tmp_path / "rows.jsonl", [longbench_row("lcc"), good, changed(good, changes)])
    with pytest.raises(PipelineError, match=text) as caught:
        read_documents(task, path)
    assert only(caught).startswith(f"{path}, line 3: ")


def test_tables_of_both_kinds_that_were_joined_are_read(tmp_path: Path) -> None:
    published = longbench_row("gov_report")
    expected = read_documents("gov_report", write(tmp_path / "rows.jsonl", [published]))
    ready = {"task": "gov_report", "prompt": expected[0].prompt, "answers": published["answers"]}
    pl.DataFrame([published | {"input": None}, ready], infer_schema_length=None).write_parquet(
        tmp_path / "both.parquet"
    )
    for document in read_documents("gov_report", tmp_path / "both.parquet"):
        assert document == expected[0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ground_truth_ctx": True}, "ground_truth_ctx"),
        ({"ground_truth_ctx": NAN}, "lacks the column ground_truth_ctx"),
        ({"ctxs": ["a"]}, "ctxs.0"),
        ({"ctxs": [0.5]}, "ctxs.0"),
        ({"ctxs": "[1]"}, "ctxs"),
        ({"answers": "Hi"}, "answers"),
        ({"answers": [None]}, "answers.0"),
        ({"answers": [" "]}, "answers.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "User", "content": "a"}]}, "messages.0.role"),
        ({"messages": ["a"]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages.0.content"),
    ],
)
def test_dialogues_that_are_none_are_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=text) as caught:
        dialogues.read_documents(source(tmp_path, [ROW, ROW | change]))
    assert "retrieved.jsonl: row 1 " in only(caught)


def test_dialogues_after_pandas_and_windows(tmp_path: Path) -> None:
    expected = dialogues.read_documents(source(tmp_path, [ROW]))
    source(tmp_path, [ROW | {"ground_truth_ctx": 0.0, "ctxs": ["1"]}])
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_text().encode("utf-16"))
    assert dialogues.read_documents(tmp_path) == expected
    for documents in ({"ssa": ["a", None]}, {"ssa": "ab"}, {"ssa": None}):
        with pytest.raises(PipelineError, match=r"documents\.json: ssa "):
            dialogues.read_documents(source(tmp_path, [ROW], documents))
    with pytest.raises(PipelineError, match="row 0 is no JSON object"):
        dialogues.read_documents(source(tmp_path, ["row"]))


@pytest.mark.parametrize(
    "change",
    [{"outputs": "12"}, {"outputs": []}, {"outputs": [12]}, {"outputs": [""]}, {"input": NAN}, {"index": DROP}],
)
def test_generated_rows_that_are_none_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    good = {"input": "a", "outputs": ["12"], "length": 3, "index": 0, "seed": 1}
    assert checked_rows(tmp_path / "vt.json", [good]) == [good]
    with pytest.raises(PipelineError, match=r"vt\.json, counted from 0: row 1 "):
        checked_rows(tmp_path / "vt.json", [good, changed(good, change)])


LINE = '{"a": "é\u2028\x85", "b": 1}'
EXPECTED = [{"a": "é\u2028\x85", "b": 1}, {"a": "x", "b": 2}]
TEXT = f'{LINE}\n\n{{"a": "x", "b": 2}}\n'


@pytest.mark.parametrize(
    "write_bytes",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-32"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.rstrip().encode(),
        lambda text: f"\n  {text}".encode(),
    ],
)
def test_texts_of_other_systems_are_read(write_bytes: Callable[[str], bytes], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(write_bytes(TEXT))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(write_bytes(TEXT)))
    assert read_rows(tmp_path / "rows.jsonl") == read_rows(tmp_path / "rows.jsonl.gz") == EXPECTED


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (TEXT.replace("\u2028\x85", "").encode("latin-1"), "line 1 is no text in UTF-8"),
        ('{"a": "ok"}\n{"a": "\xe9"}'.encode("cp1252"), "line 2 is no text in UTF-8"),
        (b'[{"a": 1}, {"a": 2}]', "line 1: every line must be a JSON object; .*jq -c"),
        (b'[\n{"a": 1},\n{"a": 2}\n]', "line 1: every line must be a JSON object"),
        (b'{\n  "a": 1\n}', "line 1: "),
        (b'{"a": 1}\n{"a": 1, "a": 2}', "line 2: the key 'a' is there twice"),
        (b'{"a": 1}\n{"a": {"b": 1, "b": 1}}', "line 2: the key 'b' is there twice"),
        (b'{"a": 1}\nnull', "line 2: every line"),
        (b"a,b\n1,2", "line 1: "),
        (b"PAR1", "line 1: "),
        (b'{"a": ' + b"[" * 100_000, "cannot be read as rows"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: "),
        (gzip.compress(b"{}", mtime=0), "line 1 is no text"),
    ],
)
def test_files_that_are_no_lines_are_one_sentence(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=text) as caught:
        read_rows(path)
    assert only(caught).startswith(str(path))


def test_an_encrypted_archive_is_one_sentence(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", TEXT)
    content = bytearray((tmp_path / "data.zip").read_bytes())
    # The flag of encryption, in the entry and in the directory.
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + offset] |= 1
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(PipelineError, match="encrypted"):
        read_documents("qasper", tmp_path)


PARQUET_TYPES = {
    "large": pa.schema([("question", pa.large_string()), ("passage", pa.large_string()), ("label", pa.float64())]),
    "dictionary": pa.schema(
        [("question", pa.string()), ("passage", pa.dictionary(pa.int8(), pa.string())), ("label", pa.uint8())]
    ),
    "view": pa.schema([("question", pa.string_view()), ("passage", pa.string()), ("label", pa.bool_())]),
    "text": pa.schema([("question", pa.string()), ("passage", pa.string()), ("label", pa.string())]),
}


@pytest.mark.parametrize("name", PARQUET_TYPES)
def test_columns_of_other_types_are_the_same(name: str, tmp_path: Path) -> None:
    schema = PARQUET_TYPES[name]
    label: Any = {"large": 1.0, "view": True, "text": "1"}.get(name, 1)
    rows = [{"question": "a", "passage": "b", "label": label}]
    # A folder's name is no column.
    path = tmp_path / "label=0" / "rows.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    assert [question.gold for question in read_questions("boolq", path)] == [1]
    pq.write_table(pa.Table.from_pylist(rows, schema).append_column("label", pa.array([0])), path)
    with pytest.raises(PipelineError, match="two of its columns have one name"):
        read_questions("boolq", path)
    pq.write_table(pa.Table.from_pylist([], schema), path)
    assert read_questions("boolq", path) == []


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 4), pa.list_view])
def test_lists_of_other_types_are_the_same(lists: Callable[[pa.DataType], pa.DataType], tmp_path: Path) -> None:
    row = HUB_ROWS["mmlu"][0]
    kinds = [
        ("question", pa.string()),
        ("subject", pa.string()),
        ("choices", lists(pa.string())),
        ("answer", pa.int8()),
    ]
    try:
        pq.write_table(pa.Table.from_pylist([row], pa.schema(kinds)), tmp_path / "rows.parquet")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        pytest.skip("this pyarrow cannot write the type")
    assert read_questions("mmlu", tmp_path / "rows.parquet") == read_questions(
        "mmlu", write(tmp_path / "rows.jsonl", [row])
    )


def test_a_parquet_row_is_counted_from_0(tmp_path: Path) -> None:
    rows = [PLAIN_ROWS["boolq"], PLAIN_ROWS["boolq"] | {"passage": None}]
    pl.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(PipelineError, match=r"rows\.parquet, counted from 0: row 1 is no row of boolq .*no value"):
        read_questions("boolq", tmp_path / "rows.parquet")
