"""A trained policy used through kvpress keeps what the sweep keeps."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from pipeline.errors import PipelineError
from pipeline.eviction.budget import kept_tokens, protected_ranking
from pipeline.eviction.press import KVPPress
from pipeline.models.layers import full_attention_layers
from pipeline.models.layout import cache_layout
from pipeline.models.load import head_shape
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, save_policy
from tests.conftest import MakeModel
from tests.eviction.prefills import PROMPT, compressed, layer_caches, token_indices
from tests.models.families import config

AGENT = AgentParams(hidden_width=8, hidden_layers=2, inputs=("key", "value", "position", "age"))


def saved(directory: Path, layers: int = 3, kv_heads: int = 2, head_dim: int = 16) -> Path:
    policy = Policy(PolicyShape(layers, kv_heads, head_dim, AGENT), torch.Generator().manual_seed(1))
    save_policy(directory, policy, {"model": "tiny"})
    return directory


@pytest.mark.parametrize("protected", [(0, 0), (4, 16)])
@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_the_press_keeps_what_the_policy_ranks_first(
    family: str, ratio: float, protected: tuple[int, int], make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(family)
    layers, kv_heads, _ = head_shape(model)
    press = KVPPress(ratio, saved(tmp_path, layers), *protected)
    cache, caches = compressed(model, PROMPT, press), layer_caches(model, PROMPT)
    heads = set()
    for index, number in enumerate(full_attention_layers(model.config)):
        theirs, layer = cache.layers[number], caches[number]
        with torch.no_grad():
            scores = press.policy(layer.keys, layer.values, layer=index)
        ours = kept_tokens(protected_ranking(scores, *protected), theirs.keys.shape[2])
        kept = token_indices(theirs.keys[0], layer.keys)
        assert torch.equal(kept, ours)
        heads |= {tuple(head) for head in kept.tolist()}
    assert len(heads) == layers * kv_heads  # every head keeps its own tokens


def test_layers_that_slide_over_a_window_keep_it(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("gemma3")
    cache = compressed(model, PROMPT, KVPPress(0.75, saved(tmp_path, layers=2)))
    plain = layer_caches(model, PROMPT)
    tokens = {number: layer.keys.shape[2] for number, layer in enumerate(cache.layers)}
    assert tokens == {0: 23, 1: 75, 2: 23, 3: 75}
    for number in (0, 2):
        torch.testing.assert_close(cache.layers[number].keys, plain[number].keys[None])
        torch.testing.assert_close(cache.layers[number].values, plain[number].values[None])


def test_the_language_part_of_a_multimodal_model_is_ranked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("Gemma 3 (multimodal)")).eval()
    press = KVPPress(0.5, saved(tmp_path, layers=2))
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), press(model):
        model(input_ids=PROMPT[None] % 128, past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [23, 150, 23, 150]  # windows of 24, and half of 300


def test_a_family_that_kvpress_does_not_know_is_one_sentence(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config("GPT-2")).eval()
    press = KVPPress(0.5, saved(tmp_path, layers=4, kv_heads=4))
    with pytest.raises(PipelineError, match="kvpress cannot be used with GPT2LMHeadModel"), press(model):
        pass


def test_a_policy_of_hidden_states_is_refused(tmp_path: Path) -> None:
    agent = AGENT.model_copy(update={"inputs": ("hidden", "age")})
    save_policy(tmp_path, Policy(PolicyShape(3, 2, 64, agent)), {"model": "tiny"})
    with pytest.raises(PipelineError, match="ranks tokens by hidden states, which a cache does not hold"):
        KVPPress(0.5, tmp_path)


def test_the_first_4_and_last_16_are_kept_by_default(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    cache = compressed(model, PROMPT, KVPPress(0.9, saved(tmp_path)))
    protected = {*range(4), *range(len(PROMPT) - 16, len(PROMPT))}
    for theirs, layer in zip(cache.layers, layer_caches(model, PROMPT), strict=True):
        for kept in token_indices(theirs.keys[0], layer.keys).tolist():
            assert protected < set(kept)


def test_every_sequence_of_a_batch_is_ranked_by_itself(make_model: MakeModel, tmp_path: Path) -> None:
    press, model = KVPPress(0.5, saved(tmp_path)), make_model("llama")
    press.post_init_from_model(model)
    layer, module = layer_caches(model, PROMPT)[1], cache_layout(model).modules[1]
    keys, values = layer.keys[None], layer.values[None]
    both = press.score(module, None, torch.cat([keys, keys.flip(1)]), torch.cat([values] * 2), None, {})
    alone = press.score(module, None, keys.flip(1), values, None, {})
    assert both.shape == (2, 2, len(PROMPT))
    torch.testing.assert_close(both[1], alone[0])


@pytest.mark.parametrize("other", [{"layers": 2}, {"kv_heads": 3}, {"head_dim": 8}], ids=str)
def test_a_model_of_another_shape_is_refused(other: dict[str, int], make_model: MakeModel, tmp_path: Path) -> None:
    press, model = KVPPress(0.5, saved(tmp_path / "policy", **other)), make_model("llama")
    with pytest.raises(PipelineError, match=r"policy ranks .* but the model has .*; train a policy for") as caught:
        compressed(model, PROMPT, press)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="holds no readable policy"):
        KVPPress(0.5, tmp_path)
