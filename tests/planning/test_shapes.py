"""Sizes of models: from config.json, from the table, or one sentence."""

import json
from pathlib import Path

import pytest
from transformers import PretrainedConfig

from pipeline.errors import PipelineError
from pipeline.models.load import head_shape
from pipeline.planning.shapes import SHAPES, model_shape
from pipeline.sources.pins import SourceParams
from tests.conftest import FAMILIES, MakeModel
from tests.planning.profiles import NAMES, read_profile


def source_of(uri: str) -> SourceParams:
    return SourceParams(uri=uri, licence="any", revision="0" * 40)


def write_config(models: Path, config: PretrainedConfig) -> None:
    (models / "tiny").mkdir()
    config.to_json_file(models / "tiny/config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_gives_the_parameters_of_its_model(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(family)
    write_config(tmp_path, model.config)
    shape, source = model_shape("tiny", source_of("file:/models/tiny"), tmp_path)
    assert (shape.ranked_layers, shape.kv_heads, shape.head_dim) == head_shape(model)
    assert shape.layers == model.config.num_hidden_layers
    # Biases and norms weigh more in a model this small.
    assert shape.parameters == pytest.approx(sum(parameter.numel() for parameter in model.parameters()), rel=0.02)
    assert source == str(tmp_path / "tiny/config.json")


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As published with the weights on the hub.
    [
        ("SmolLM2-135M-Instruct", 134_515_008),
        ("Qwen2.5-7B-Instruct", 7_615_616_512),
        ("phi-4", 14_659_507_200),
        ("gemma-3-270m", 268_098_176),
    ],
)
def test_the_table_gives_the_published_parameters(name: str, parameters: int) -> None:
    assert SHAPES[name].parameters == pytest.approx(parameters, rel=0.001)


@pytest.mark.parametrize("profile", NAMES)
def test_every_profile_can_be_planned_before_its_models_are_fetched(profile: str, tmp_path: Path) -> None:
    params = read_profile(profile)
    for name in params.models:
        _, source = model_shape(name, params.model_sources(name)["source"], tmp_path)
        assert source.startswith("the published sizes of ")


def test_a_name_that_only_begins_alike_is_another_model(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"mini/config\.json does not exist"):
        model_shape("mini", source_of("hub:microsoft/phi-4-mini-instruct"), tmp_path)


def test_an_unknown_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"run the model stage for mine first\.$") as caught:
        model_shape("mine", source_of("file:/models/mine"), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"hidden_size": 8})])
def test_a_config_without_sizes_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text(content)
    with pytest.raises(PipelineError, match=r"tiny/config\.json does not give the sizes .*run the model stage again"):
        model_shape("tiny", source_of("hub:owner/tiny"), tmp_path)
