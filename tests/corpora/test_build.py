"""What is refused before a corpus is fetched."""

import json
from pathlib import Path
from typing import Any

import pytest

import pipeline.corpora.build as module
from pipeline.corpora.build import build_longer_samples, build_samples
from pipeline.errors import PipelineError
from pipeline.params import LongerParams, RulerParams, load_params
from tests.corpora.test_choice import write
from tests.corpora.test_longbench import params as longbench_params
from tests.corpora.test_longbench import row as longbench_row
from tests.samples import tokenizers as tiny

REPOSITORY = Path(__file__).parents[2]
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}


class Fetched(Exception):
    """The check was passed."""


@pytest.fixture
def ruler(monkeypatch: pytest.MonkeyPatch) -> RulerParams:
    def fetch(*_: object) -> None:
        raise Fetched

    monkeypatch.setattr(module, "fetch", fetch)
    params = load_params(REPOSITORY / "profiles/default.yaml").corpora["ruler"]
    assert isinstance(params, RulerParams)
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
def test_a_corpus_within_the_window_is_built(config: dict[str, Any], ruler: RulerParams, tmp_path: Path) -> None:
    write_config(tmp_path, config)
    with pytest.raises(Fetched):
        build_samples(ruler, "ruler", tmp_path, tmp_path)


def test_a_corpus_longer_than_the_window_is_one_sentence(ruler: RulerParams, tmp_path: Path) -> None:
    write_config(tmp_path, {"max_position_embeddings": 1999})
    with pytest.raises(PipelineError, match=r"^corpora\.long: length 2000 is above the 1999 tokens that .* reads"):
        build_samples(ruler, "long", tmp_path, tmp_path)
    longer = LongerParams(length=4097, samples=1)
    write_config(tmp_path, {"max_position_embeddings": 1024, "rope_scaling": YARN})
    with pytest.raises(PipelineError, match=r"^sensitivity\.longer\.long: length 4097 is above the 4096 tokens"):
        build_longer_samples(ruler, longer, "long", tmp_path, [], tmp_path)


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
def test_every_place_of_a_window_is_read(
    config: dict[str, Any], window: int, ruler: RulerParams, tmp_path: Path
) -> None:
    write_config(tmp_path, config)
    with pytest.raises(PipelineError, match=f"^corpora.long: length 2000 is above the {window} tokens"):
        build_samples(ruler, "long", tmp_path, tmp_path)
    write_config(tmp_path, {"max_position_embeddings": 2000, "text_config": config.get("text_config")})
    with pytest.raises(Fetched):
        build_samples(ruler, "long", tmp_path, tmp_path)


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
    content: bytes, message: str, ruler: RulerParams, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PipelineError, match=message) as caught:
        build_samples(ruler, "long", tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_template_was_told_is_recorded(tmp_path: Path) -> None:
    rows = [longbench_row("qasper", number) for number in range(2)]
    source = {"uri": f"file:{write(tmp_path / 'rows.jsonl', rows)}", "licence": "MIT"}
    params = longbench_params(("qasper",), source=source)
    recorded = {}
    for name, template in (("plain", tiny.CHATML), ("dated", tiny.SMOLLM3), ("base", None)):
        model = tiny.save(tiny.byte_tokenizer(template), tmp_path / name)
        recorded[name] = build_samples(params, "longbench", model, tmp_path)[1]
        assert recorded[name]["source"]["licence"] == "MIT"
    assert recorded["dated"]["chat_template"] == {"date": "2024-07-26", "thinking": "off"}
    assert "chat_template" not in recorded["plain"] | recorded["base"]
    # Where a processor has the template, the tokenizer's prompts would be those of a base model.
    (tmp_path / "base/chat_template.json").write_text(json.dumps({"chat_template": tiny.CHATML}))
    with pytest.raises(PipelineError, match=r"base/chat_template\.json holds a template that its tokenizer does not"):
        build_samples(params, "longbench", tmp_path / "base", tmp_path)
