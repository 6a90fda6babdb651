"""Which layers see the whole context, for each way in which a config says so."""

import pytest
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig, Qwen2Config

from pipeline.models.layers import full_attention_layers
from tests.conftest import SIZES

CONFIGS: dict[str, tuple[PretrainedConfig, tuple[int, ...]]] = {
    "no window": (LlamaConfig(**SIZES), (0, 1, 2)),
    "Gemma 3, every sixth layer": (Gemma3TextConfig(num_hidden_layers=18, sliding_window=512), (5, 11, 17)),
    "Qwen2, the first layers": (
        Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1, sliding_window=16),
        (0,),
    ),
    "Phi-3, one window for all": (Phi3Config(**SIZES, sliding_window=16), ()),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_the_layers_are_those_whose_cache_grows(what: str) -> None:
    config, expected = CONFIGS[what]
    assert full_attention_layers(config) == expected
    growing = [number for number, layer in enumerate(DynamicCache(config=config).layers) if not layer.is_sliding]
    assert growing == list(expected)


def test_a_window_that_no_text_exceeds_is_none() -> None:
    assert full_attention_layers(Phi3Config(**SIZES, sliding_window=SIZES["max_position_embeddings"])) == (0, 1, 2)
