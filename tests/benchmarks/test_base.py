"""Every file of the folder is a benchmark of its name; what is refused before a source is fetched, and after."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

import pipeline.benchmarks.base_making as module
from pipeline.benchmarks.base import BENCHMARKS, Benchmark, EvaluationSize, read_benchmark
from pipeline.benchmarks.base_making import make_samples
from pipeline.benchmarks.ruler import Ruler
from pipeline.errors import PipelineError
from pipeline.params import Params
from pipeline.samples.rows import Row
from pipeline.sources.pins import SourceParams
from tests.benchmarks.making import choice, write
from tests.benchmarks.test_longbench import params as longbench_params
from tests.benchmarks.test_longbench import row as longbench_row
from tests.samples import tokenizers as tiny

YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}


SOURCES = {role: SourceParams(uri=f"file:{role}", licence="MIT") for role in ("source", "sentence_splitter")}


def local(path: Path) -> dict[str, SourceParams]:
    return {"source": SourceParams(uri=f"file:{path}", licence="MIT")}


class Fetched(Exception):
    """The check was passed."""


@pytest.fixture
def ruler(default_params: Params, monkeypatch: pytest.MonkeyPatch) -> Ruler:
    def fetch(*_: object) -> None:
        raise Fetched

    monkeypatch.setattr(module, "fetch", fetch)
    params = default_params.benchmarks["ruler"].samples
    assert isinstance(params, Ruler)
    return params.model_copy(update={"length": 1024, "task_lengths": {"qa_1": 2000}})


def write_config(model: Path, config: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_position_embeddings": 2000},
        {"max_position_embeddings": 1024, "rope_scaling": YARN},
        {"max_position_embeddings": 1024, "rope_parameters": YARN},
        {"max_position_embeddings": 4096, "rope_scaling": YARN},
        {"max_position_embeddings": 2000, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        {"max_position_embeddings": 2000, "rope_scaling": None},
    ],
)
def test_what_fits_the_window_is_built(config: dict[str, Any], ruler: Ruler, tmp_path: Path) -> None:
    write_config(tmp_path, config)
    with pytest.raises(Fetched):
        make_samples(ruler, "ruler", tmp_path, SOURCES, tmp_path)


def test_what_is_longer_than_the_window_is_one_sentence(ruler: Ruler, tmp_path: Path) -> None:
    write_config(tmp_path, {"max_position_embeddings": 1999})
    with pytest.raises(
        PipelineError, match=r"^benchmarks\.long\.samples: length 2000 is above the 1999 tokens that .* reads"
    ):
        make_samples(ruler, "long", tmp_path, SOURCES, tmp_path)
    write_config(tmp_path, {"max_position_embeddings": 1024, "rope_scaling": YARN})
    longer = ruler.model_copy(update={"length": 4097})
    with pytest.raises(PipelineError, match=r"^benchmarks\.long\.samples: length 4097 is above the 4096 tokens"):
        make_samples(longer, "long", tmp_path, SOURCES, tmp_path)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"text_config": {"max_position_embeddings": 1999}}, 1999),
        ({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 1999}}, 1999),
        ({"n_positions": 1999}, 1999),
        ({"text_config": {"max_position_embeddings": 100, "rope_scaling": {**YARN, "factor": 1.5}}}, 1536),
        ({"max_position_embeddings": 1999, "rope_scaling": {"factor": None, "rope_type": "default"}}, 1999),
    ],
)
def test_every_place_of_a_window_is_read(config: dict[str, Any], window: int, ruler: Ruler, tmp_path: Path) -> None:
    write_config(tmp_path, config)
    with pytest.raises(PipelineError, match=f"^benchmarks.long.samples: length 2000 is above the {window} tokens"):
        make_samples(ruler, "long", tmp_path, SOURCES, tmp_path)
    write_config(tmp_path, {"max_position_embeddings": 2000, "text_config": config.get("text_config")})
    with pytest.raises(Fetched):
        make_samples(ruler, "long", tmp_path, SOURCES, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json cannot be read"),
        (b"\xff", "config.json cannot be read"),
        (b"[]", "config.json is no JSON object"),
        (b'{"max_position_embeddings": "long"}', "max_position_embeddings or n_positions, .* are no numbers"),
        (b'{"max_position_embeddings": [9]}', "are no numbers"),
        (b'{"rope_scaling": "linear"}', "are no numbers"),
        (b'{"rope_scaling": {"factor": "4", "original_max_position_embeddings": "x"}}', "are no numbers"),
    ],
)
def test_an_unreadable_configuration_is_one_sentence(
    content: bytes, message: str, ruler: Ruler, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PipelineError, match=message) as caught:
        make_samples(ruler, "long", tmp_path, SOURCES, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_template_was_told_is_recorded(tmp_path: Path) -> None:
    rows = [longbench_row("qasper", number) for number in range(2)]
    sources = local(write(tmp_path / "rows.jsonl", rows))
    params = longbench_params(("qasper",))
    recorded = {}
    for name, template in (("plain", tiny.CHATML), ("dated", tiny.SMOLLM3), ("base", None)):
        model = tiny.save(tiny.byte_tokenizer(template), tmp_path / name)
        recorded[name] = make_samples(params, "longbench", model, sources, tmp_path)[1]
        assert recorded[name]["source"]["licence"] == "MIT"
    assert recorded["dated"]["chat_template"] == {"date": "2024-07-26", "thinking": "off"}
    assert "chat_template" not in recorded["plain"] | recorded["base"]
    # Where a processor has the template, the tokenizer's prompts would be those of a base model.
    (tmp_path / "base/chat_template.json").write_text(json.dumps({"chat_template": tiny.CHATML}))
    with pytest.raises(PipelineError, match=r"base/chat_template\.json holds a template that its tokenizer does not"):
        make_samples(params, "longbench", tmp_path / "base", sources, tmp_path)


def test_a_tokenizer_with_other_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    rows: list[Row] = [{"question": "q", "passage": "p", "label": 1}] * 2
    sources = local(write(tmp_path / "rows.jsonl", rows))
    for nested, size in ((False, 5), (True, 5), (False, 500), (True, 500)):
        model = tiny.save(tiny.byte_tokenizer(), tmp_path / f"model{nested}{size}")
        config = {"text_config": {"vocab_size": size}} if nested else {"vocab_size": size}
        (model / "config.json").write_text(json.dumps(config))
        if size == 500:
            assert make_samples(choice("boolq"), "boolq", model, sources, tmp_path)[0]["test"]
            continue
        with pytest.raises(PipelineError, match=r"its tokenizer gives token \d+ in sample test-0000\d, but vocab_size"):
            make_samples(choice("boolq"), "boolq", model, sources, tmp_path)


def test_choices_longer_than_the_window_are_refused(tmp_path: Path) -> None:
    # How long they are is known when they are made.
    sources = local(write(tmp_path / "rows.jsonl", [{"question": "q", "passage": "p" * 90, "label": 1}] * 2))
    model = tiny.save(tiny.byte_tokenizer(), tmp_path / "model", max_position_embeddings=100)
    with pytest.raises(PipelineError, match=r"benchmarks\.boolq\.samples: length \d+ is above the 100 tokens"):
        make_samples(choice("boolq"), "boolq", model, sources, tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS.names())
def test_a_file_is_the_benchmark_of_its_name(name: str) -> None:
    found = BENCHMARKS.load(name)
    assert issubclass(found, Benchmark)
    assert found.__module__ == f"pipeline.benchmarks.{name}"
    assert get_args(found.model_fields["kind"].annotation) == (name,)
    # Only what is divided can be learned from.
    assert found.trainable == (found.model_fields["sizes"].annotation is not EvaluationSize)


def test_what_benchmarks_share_is_none(tmp_path: Path) -> None:
    assert {"ruler", "dialogues", "oasst", "longbench", "boolq", "mmlu"} <= set(BENCHMARKS.names())
    for kind in ("books", "base", "base_choice", "__init__", None, ["ruler"]):
        tree = {"benchmarks": {"x": {"samples": {"kind": kind}}}}
        with pytest.raises(
            PipelineError, match=r"benchmarks\.x\.samples\.kind: .* is no benchmark; known: arc_challenge,"
        ):
            read_benchmark("x", tmp_path / "params.yaml", tree)
    with pytest.raises(PipelineError, match=f"'books' is no benchmark; known: {', '.join(BENCHMARKS.names())}"):
        BENCHMARKS.load("books")


def test_a_section_is_checked_by_its_file(default_params: Params, tmp_path: Path) -> None:
    section = default_params.benchmarks["boolq"].samples.model_dump()

    def read(**changes: Any) -> Benchmark:
        return read_benchmark("x", tmp_path / "params.yaml", {"benchmarks": {"x": {"samples": section | changes}}})

    assert read() == default_params.benchmarks["boolq"].samples
    with pytest.raises(PipelineError, match=r"params\.yaml: unknown key benchmarks\.x\.samples\.length"):
        read(length=7)
    with pytest.raises(PipelineError, match=r"benchmarks\.x\.samples\.sizes\.train: .*should be 0 \(got 3\)"):
        read(sizes={"train": 3, "test": 1})
