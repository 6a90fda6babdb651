"""A params file with a mistake gives one sentence that names the file and the key."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.dependency.param import read_param_file
from dvc.fs import LocalFileSystem
from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.params import load_params
from pipeline.profiles import render

PROFILE = render("ci", Path(__file__).parent.parent / "profiles").params
CONTENT: dict[str, Any] = YAML(typ="safe").load(PROFILE)
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


# For evaluation only.
CHOICE = {
    "samples": {"kind": "boolq", "source": "boolq", "late_question": True, "sizes": {"test": 2}, "seed": 0},
    "evaluate": {"budgets": [16, 32], "shorter": "whole"},
    "shown": {"title": "BoolQ"},
}


def edited(path: Path, edit: Edit) -> Path:
    content = copy.deepcopy(CONTENT)
    edit(content)
    with path.open("w") as stream:
        YAML(typ="safe").dump(content, stream)
    return path


MISTAKES = {
    "unknown key": (put("sweep", 1), "unknown key sweep"),
    "unknown nested key": (put("train.agent.hidden_widht", 8), "unknown key train.agent.hidden_widht"),
    "unknown key of a benchmark": (
        put("benchmarks.ruler.samples.lenght", 8),
        "unknown key benchmarks.ruler.samples.lenght",
    ),
    "unknown part of a benchmark": (put("benchmarks.ruler.length", 8), "unknown key benchmarks.ruler.length"),
    "missing part of a benchmark": (drop("benchmarks.ruler.shown"), "missing key benchmarks.ruler.shown"),
    "benchmark that is none": (put("benchmarks.ruler", 8), r"benchmarks.ruler: it should be a mapping \(got 8\)"),
    "missing key": (drop("train.steps"), "missing key train.steps"),
    "missing section": (drop("report"), "missing key report"),
    "quoted number": (put("train.steps", "24"), r"train.steps: .*integer.*\(got '24'\)"),
    "word for a number": (put("train.learning_rate", "fast"), r"train.learning_rate: .*number.*\(got 'fast'\)"),
    "fraction for a count": (put("traces.cuts", 1.5), "traces.cuts: .*integer"),
    "yes for a number": (put("evaluation.n_sink", True), "evaluation.n_sink: .*integer"),
    "scalar for a list": (put("matrix.model", "smollm2-135m"), "matrix.model: Input should be a list"),
    "zero steps": (put("train.steps", 0), "train.steps: .*greater than 0"),
    "negative rate": (put("train.learning_rate", -1e-3), "train.learning_rate: .*greater than 0"),
    "not a number": (put("train.learning_rate", float("nan")), "train.learning_rate: .*finite number"),
    "one sample for a baseline": (
        put("estimators.rloo.samples", 1),
        "estimators.rloo.samples: .*greater than or equal to 2",
    ),
    "certain confidence": (put("report.confidence", 1.0), "report.confidence: .*less than 1"),
    "a share above all": (put("traces.at_prompt_end", 1.5), "traces.at_prompt_end: .*less than or equal to 1"),
    "one token, which has one order": (put("traces.tokens", 1), "traces.tokens: .*greater than or equal to 2"),
    "unknown input": (
        put("train.agent.inputs", ["key", "query"]),
        "train.agent.inputs: 'query' is no input of an agent; known: age, hidden, key, position, value",
    ),
    "input twice": (put("train.agent.inputs", ["key", "key"]), "train.agent.inputs: an input is named twice"),
    "unknown dtype": (put("models.smollm2-135m.dtype", "float64"), "models.smollm2-135m.dtype: .*'float32'"),
    "estimator that is not there": (
        put("matrix.estimator", ["ppo"]),
        "matrix.estimator names 'ppo', which is not in estimators; there are exact, rloo, soft_rank",
    ),
    "unknown estimator": (
        put("estimators.ppo", {}),
        "estimators: 'ppo' is no estimator; known: exact, rloo, soft_rank",
    ),
    "option that an estimator does not have": (put("estimators.exact.samples", 2), "unknown key estimators.exact.samp"),
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
        put("benchmarks.ruler.samples.tasks", ["vt", "niah_9"]),
        r"benchmarks.ruler.samples.tasks: unknown RULER task 'niah_9'; known: niah_single_1",
    ),
    "length of an unknown task": (
        put("benchmarks.ruler.samples.task_lengths", {"qa_3": 2048}),
        r"benchmarks.ruler.samples.task_lengths: unknown RULER task 'qa_3'",
    ),
    "unknown kind of benchmark": (
        put("benchmarks.ruler.samples.kind", "books"),
        "benchmarks.ruler.samples.kind: 'books' is no benchmark; known: arc_challenge, boolq",
    ),
    "samples that are none": (
        put("benchmarks.ruler.samples", 8),
        "benchmarks.ruler.samples: it should be a mapping",
    ),
    "wheel without checksum": (
        drop("sources.smollm2-135m.sha256"),
        "sources.smollm2-135m: a wheel: source must be pinned by its sha256",
    ),
    "checksum cut short": (put("sources.smollm2-135m.sha256", "abc123"), "sources.smollm2-135m.sha256: "),
    "hub without revision": (
        put("sources.smollm2-135m", {"uri": "hub:owner/name", "licence": "MIT"}),
        "sources.smollm2-135m: a hub: source must be pinned by its revision",
    ),
    "hub at a branch": (
        put("sources.smollm2-135m", {"uri": "hub:owner/name", "licence": "MIT", "revision": "main"}),
        "sources.smollm2-135m: a hub: source must be pinned by its revision, the 40 lower-case hexadecimal digits",
    ),
    "unknown scheme": (
        put("sources.smollm2-135m.uri", "ftp:owner/name"),
        "sources.smollm2-135m: uri must start with hub:, file:, wheel: or join:, not 'ftp:owner/name'",
    ),
    "joined file without parts": (
        put("sources.smollm2-135m.uri", "join:model.gguf"),
        "sources.smollm2-135m: a join: source lists the files to join in parts, and no other source has parts",
    ),
    "parts of a file that is not joined": (
        put("sources.smollm2-135m.parts", [{"uri": "file:a"}]),
        "sources.smollm2-135m: a join: source lists the files to join in parts, and no other source has parts",
    ),
    "joined file without checksum": (
        put("sources.smollm2-135m", {"uri": "join:a.gguf", "licence": "MIT", "parts": [{"uri": "file:a"}]}),
        "sources.smollm2-135m: a join: source must be pinned by its sha256",
    ),
    "part without checksum": (
        put("sources.smollm2-135m.parts", [{"uri": "file:a"}, {"uri": "wheel:a==1/b"}]),
        r"sources.smollm2-135m.parts.1: a wheel: source must be pinned by its sha256",
    ),
    "part that is joined": (
        put("sources.smollm2-135m.parts", [{"uri": "join:a"}]),
        "sources.smollm2-135m.parts.0: uri must start with hub:, file: or wheel:, not 'join:a'",
    ),
    "source that is not there": (
        put("models.smollm2-135m.source", "gpt-5"),
        "models.smollm2-135m.source names 'gpt-5', which is not in sources; there are arc_challenge, boolq",
    ),
    "source of a benchmark that is not there": (
        put("benchmarks.ruler.samples.sentence_splitter", "nltk"),
        "benchmarks.ruler.samples names 'nltk', which is not in sources",
    ),
    "model that is not there": (put("matrix.model", ["gpt-5"]), "matrix.model names 'gpt-5', which is not in models"),
    "training on what is not there": (
        put("matrix.trained_on", ["wiki"]),
        "matrix.trained_on names 'wiki', which is not in benchmarks",
    ),
    "benchmark that is not there": (
        put("matrix.benchmark", ["ruler", "dialogues", "wiki"]),
        "matrix.benchmark names 'wiki', which is not in benchmarks",
    ),
    "training on what is not evaluated": (
        put("matrix.benchmark", ["ruler"]),
        "matrix.benchmark lacks 'dialogues', which matrix.trained_on names",
    ),
    "training on what is for evaluation only": (
        put("benchmarks.dialogues", CHOICE),
        "matrix.trained_on names 'dialogues', which is for evaluation only; name it in benchmark",
    ),
    "training on one split alone": (
        put("benchmarks.ruler.samples.sizes", {"test": 1}),
        "matrix.trained_on names 'ruler', which is for evaluation only; name it in benchmark",
    ),
    "budget as long as the text": (
        put("evaluation.budgets", [64, 512]),
        "benchmarks.ruler: the largest budget, 512, is not below its length of 512 tokens, so that nothing would be",
    ),
    "own budget below the protected": (
        both(put("benchmarks.boolq", CHOICE), put("matrix.benchmark", ["ruler", "dialogues", "boolq"])),
        "benchmarks.boolq: the smallest budget, 16, is below the 20 protected tokens",
    ),
    "own budgets descend": (
        put("benchmarks.boolq.evaluate.budgets", [32, 16]),
        "benchmarks.boolq.evaluate.budgets: budgets must be distinct and ascending",
    ),
    "texts of a benchmark that is not there": (
        put("texts.tasks", {"wiki": ["vt"]}),
        "texts.tasks names 'wiki', which is not in benchmarks",
    ),
    "hidden states in a policy": (
        put("train.agent.inputs", ["hidden"]),
        "train.agent.inputs names 'hidden', but a policy ranks a cache",
    ),
    "title of a baseline that is not there": (
        put("report.titles.h2o", "H2O"),
        "report.titles names 'h2o', which is not in baselines; there are keydiff, knorm, lagkv",
    ),
    "baseline of a policy's name": (
        put("baselines.kvp-exact", {"own": "random", "sees_attention": False}),
        "baselines.kvp-exact has the name of another row of the results",
    ),
    "baseline of two makers": (put("baselines.random.press", "KnormPress"), "baselines.random: a baseline has either"),
    "baseline of no maker": (drop("baselines.random.own"), "baselines.random: a baseline has either press or own"),
    "unknown baseline of ours": (
        put("baselines.random.own", "h2o"),
        "baselines.random: 'h2o' is no baseline of ours; known: lagkv, random, snapkv, streaming_llm",
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
    "benchmark that DVC cannot address": (
        rename("benchmarks", "ruler", "ruler/4k"),
        r"benchmarks.ruler/4k: a name holds letters, digits, - and _ only.*; write ruler-4k",
    ),
    "name of nothing that DVC can address": (put("matrix.benchmark", ["../*"]), r"matrix.benchmark.0: .*a dot as one"),
    "two stages of one name": (
        put("matrix", {"model": ["a", "a-b"], "trained_on": ["c"], "benchmark": ["b-c", "c"], "estimator": ["exact"]}),
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
    entry = next(iter(CONTENT["models"].values())) | {"dtype": "bfloat16"}
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
    assert "learning_rate: 1.0e-2" in PROFILE
    path.write_text(PROFILE.replace("learning_rate: 1.0e-2", f"learning_rate: {written}"))
    assert load_params(path).train.learning_rate == float(written)
