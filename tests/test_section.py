"""One value or section of a params file: what is there, or one sentence that names the file and the key."""

from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.errors import PipelineError
from pipeline.section import Budgets, Name, Names, PositiveInt, Section, entry, parse, read

TEXT = """
train: {steps: 3, rate: 1e-3, agent: {inputs: [key, value]}}
models: {a: {dtype: float32}, b: {dtype: half}}
empty: {}
missing: null
"""


class Agent(Section):
    inputs: Names


class Train(Section):
    steps: PositiveInt
    rate: float
    agent: Agent


class Some(Section):
    steps: PositiveInt


class More(Some):
    rate: float
    agent: Agent
    seed: int


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text(TEXT)
    return tmp_path / "params.yaml"


@pytest.mark.parametrize(
    ("key", "kind", "expected"),
    [
        ("train", Train, Train(steps=3, rate=1e-3, agent=Agent(inputs=("key", "value")))),
        ("train.agent", Agent, Agent(inputs=("key", "value"))),
        ("train.agent.inputs", Names, ("key", "value")),
        ("train.steps", int, 3),
        ("models.a.dtype", Literal["float32", "half"], "float32"),
        ("models", dict[Name, Any], {"a": {"dtype": "float32"}, "b": {"dtype": "half"}}),
        ("missing", Budgets | None, None),
    ],
)
def test_what_is_there_is_read(key: str, kind: Any, expected: Any, path: Path) -> None:
    assert read(key, kind, path) == expected


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("studies", Some, r"missing key studies; add it \(profiles/default\.yaml shows every key\)"),
        ("train.seed", int, "train has no 'seed'; it has agent, rate, steps"),
        ("models.c.dtype", str, "models has no 'c'; it has a, b"),
        ("empty.a", str, "missing key empty.a; add it"),
        ("train.steps.a", int, "missing key train.steps.a; add it"),
        ("train", Some, "unknown key train.rate; remove it or correct its spelling"),
        ("train", More, "missing key train.seed; add it"),
        ("train.rate", int, r"train.rate: Input should be a valid integer.* \(got 0.001\)"),
        ("train.steps", str, r"train.steps: Input should be a valid string \(got 3\)"),
        ("train.agent", Names, "train.agent: Input should be a list"),
        ("models.b.dtype", Literal["float32"], r"models.b.dtype: Input should be 'float32' \(got 'half'\)"),
        ("missing", Some, "missing: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_key(key: str, kind: Any, message: str, path: Path) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        read(key, kind, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(
        PipelineError, match=r"params\.yaml does not exist; run from the repository root, or make it"
    ) as caught:
        parse(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["train: [1, 2\nmatrix: 3\n", "a: 1\na: 2\n", "\tx: 1\n"])
def test_a_file_that_is_no_yaml_says_where(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=r"is not valid YAML: .*line \d") as caught:
        parse(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "word\n"])
def test_a_file_without_keys_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match="the file: ") as caught:
        parse(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_entry_lists_the_names_there_are() -> None:
    with pytest.raises(PipelineError, match=r"params\.yaml: models has no 'c'; it has a, b\."):
        entry({"b": 1, "a": 2}, "c", "models")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: &x [*x]", b"[" * 3000], ids=["no text", "a circle", "too deep"])
def test_a_file_that_cannot_be_read_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in ("params.yaml", "folder"):
        with pytest.raises(PipelineError, match=name) as caught:
            parse(tmp_path / name)
        assert "\n" not in str(caught.value)
