"""The schema that every benchmark is written in, and the stage that writes it."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.params import Params
from pipeline.profiles import render
from pipeline.samples.sample import SCHEMA, SPLITS, Sample, read_samples, write_samples
from pipeline.sources.pins import state
from tests.commands import in_a_process, in_this_process

REPOSITORY = Path(__file__).parents[2]
SAMPLE = Sample("a", "ruler", "vt", "test", (1, 2, 3), 2, None, ("x", "y"), 30, "{}", ("text",), (("x", "y"),))

samples = st.builds(
    Sample,
    sample_id=st.text(max_size=5),
    benchmark=st.just("ruler"),
    task=st.text(max_size=5),
    split=st.sampled_from(SPLITS),
    input_ids=st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=9).map(tuple),
    prompt_len=st.just(1),
    question_start=st.none() | st.just(1),
    answers=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    max_new_tokens=st.integers(0, 99),
    meta=st.just("{}"),
    enough=st.lists(st.lists(st.text(max_size=3), max_size=2).map(tuple), max_size=2).map(tuple),
    gold=st.none() | st.integers(0, 3),
)
ASKED = [("text",), ("likelihood",), ("likelihood", "text"), ()]
CHOICES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=3).map(tuple)
samples = st.builds(
    lambda sample, choices, asked: replace(sample, choices=choices, ask=("choice",) if choices else asked),
    samples,
    CHOICES,
    st.sampled_from(ASKED),
)


@settings(deadline=None)
@given(rows=st.lists(samples, min_size=1, max_size=5, unique_by=lambda sample: sample.sample_id))
def test_samples_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Sample]) -> None:
    path = tmp_path_factory.mktemp("samples") / "test.parquet"
    write_samples(path, rows)
    assert read_samples(path) == rows
    assert pq.read_schema(path).equals(SCHEMA)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_samples(tmp_path / name, [SAMPLE])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no samples"),
        ([SAMPLE, SAMPLE], "share a sample_id"),
        ([replace(SAMPLE, prompt_len=3)], "sample a has no tokens after its prompt"),
        ([replace(SAMPLE, prompt_len=0)], "sample a has no tokens"),
        ([replace(SAMPLE, question_start=0)], "question of sample a starts outside its prompt"),
        ([replace(SAMPLE, question_start=3)], "question of sample a starts outside its prompt"),
    ],
)
def test_unusable_samples_are_refused(tmp_path: Path, rows: list[Sample], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        write_samples(tmp_path / "test.parquet", rows)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    with pytest.raises(PipelineError, match="cannot be read as samples"):
        read_samples(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(PipelineError, match="cannot be read as samples"):
        read_samples(path)
    pq.write_table(pa.table({"sample_id": ["a"]}), path)
    with pytest.raises(PipelineError, match="lacks the columns answers, ask, benchmark, choices, enough"):
        read_samples(path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("input_ids", [1, None, 3], "row 1 has no value in its column input_ids"),
        ("input_ids", None, "row 1 has no value in its column input_ids"),
        ("input_ids", [1, -2, 3], "sample b has a negative token id"),
        ("choices", [[1], None], "row 1 has no value in its column choices"),
        ("prompt_len", None, "row 1 has no value in its column prompt_len"),
        ("prompt_len", 0, "sample b has no tokens after its prompt"),
        ("prompt_len", 3, "sample b has no tokens after its prompt"),
        ("question_start", 3, "question of sample b starts outside its prompt"),
        ("answers", ["x", None], "row 1 has no value in its column answers"),
        ("gold", -1, "sample b names choice -1 as right"),
        ("sample_id", "a", "share a sample_id"),
        ("sample_id", None, "row 1 has no value in its column sample_id"),
        ("split", "dev", r"sample b is of no split \(dev\)"),
        ("meta", "{", "sample b has a meta that is no JSON object"),
        ("meta", "[]", "sample b has a meta that is no JSON object"),
        ("ask", None, "row 1 has no value in its column ask"),
        ("ask", [None], "row 1 has no value in its column ask"),
        ("ask", ["perplexity"], "sample b does not say what is asked of it"),
        ("ask", ["choice"], "sample b does not say what is asked of it"),
        ("choices", [[1], [2]], "sample b does not say what is asked of it"),
        ("enough", [["x"], None], "row 1 has no value in its column enough"),
        ("benchmark", None, "row 1 has no value in its column benchmark"),
    ],
)
def test_samples_edited_by_hand_are_refused(tmp_path: Path, column: str, value: object, message: str) -> None:
    path = tmp_path / "test.parquet"
    write_samples(path, [SAMPLE, replace(SAMPLE, sample_id="b")])
    rows = pq.read_table(path).to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    with pytest.raises(PipelineError, match=message) as caught:
        read_samples(path)
    assert str(caught.value).startswith(str(path))


def test_a_choice_of_negative_tokens_is_refused(tmp_path: Path) -> None:
    chosen = replace(SAMPLE, ask=("choice",), choices=((1,), (-1,)), gold=0)
    with pytest.raises(PipelineError, match="sample a has a negative token id"):
        write_samples(tmp_path / "test.parquet", [chosen])


@pytest.mark.parametrize(
    ("column", "kind"),
    [("input_ids", pa.list_(pa.int64())), ("prompt_len", pa.float64()), ("gold", pa.string()), ("meta", pa.int32())],
)
def test_samples_of_another_version_are_refused(tmp_path: Path, column: str, kind: pa.DataType) -> None:
    schema = SCHEMA.set(SCHEMA.get_field_index(column), pa.field(column, kind))
    path = tmp_path / "test.parquet"
    pq.write_table(pa.Table.from_pylist([], schema), path)
    with pytest.raises(PipelineError, match=f"its column {column} is .*, not .*; run the samples stage again"):
        read_samples(path)


def arguments(benchmark: str) -> tuple[str, ...]:
    return "stages.samples", "--model", "smollm2-135m", "--benchmark", benchmark


@pytest.fixture
def project(tmp_path: Path, smollm2: Path, default_params: Params) -> Path:
    (tmp_path / "params.yaml").write_text(render("ci", REPOSITORY / "profiles").params)
    sources = state(default_params.benchmark_sources("dialogues"))
    write_json(tmp_path / "sources/state/benchmarks/dialogues.json", sources)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/smollm2-135m").symlink_to(smollm2)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/sources").symlink_to(REPOSITORY / ".cache/sources")
    return tmp_path


def test_the_stage_writes_three_splits_and_the_source(project: Path, dialogues_wheel: Path) -> None:
    done = in_a_process(project, *arguments("dialogues"))
    assert done.returncode == 0, done.stderr
    out = project / "samples/smollm2-135m/dialogues"
    assert {file.name for file in out.iterdir()} == {*(f"{split}.parquet" for split in SPLITS), "source.json"}
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    # Another process, whose hashes of text are others.
    assert in_this_process(project, *arguments("dialogues")).returncode == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == first


def test_the_stage_says_what_is_wrong_in_one_line(project: Path) -> None:
    done = in_this_process(project, *arguments("oasst3"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: params.yaml: benchmarks has no 'oasst3'; it has arc_challenge, boolq,")
    (project / "models/smollm2-135m").unlink()
    done = in_this_process(project, *arguments("dialogues"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: models/smollm2-135m does not exist")
