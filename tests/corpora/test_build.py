"""What is refused before a corpus is fetched."""

import json
from pathlib import Path
from typing import Any

import pytest

import pipeline.corpora.build as module
from pipeline.corpora.build import build_longer_samples, build_samples
from pipeline.errors import PipelineError
from pipeline.params import LongerParams, RulerParams, load_params

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
