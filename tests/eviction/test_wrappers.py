"""Our press inside every wrapper of kvpress: agents see where in the text each key stands, or one sentence says no."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pipeline.errors import PipelineError
from pipeline.eviction.positions import SeenKeys
from pipeline.eviction.press import KVPPress
from pipeline.policy.agents import Policy
from pipeline.policy.inputs.base import CachedTokens
from tests.conftest import MakeModel
from tests.eviction.prefills import PROMPT
from tests.eviction.test_press import saved

# A wrapper -> itself around a press; what it does to a prompt of 300 tokens and 60 more is to happen often.
WRAPPERS: dict[str, Callable[[KVPPress], Any]] = {
    "AdaKVPress": kvpress.AdaKVPress,
    "BlockPress": lambda press: kvpress.BlockPress(press, block_size=20),
    "CAMPress": lambda press: kvpress.CAMPress(press, 7, 40, 0, 4),
    "ChunkKVPress": kvpress.ChunkKVPress,
    "ChunkPress": lambda press: kvpress.ChunkPress(press, chunk_length=32),
    "ComposedPress": lambda press: kvpress.ComposedPress([press]),
    "CompressionRatioDecodingPress": lambda press: kvpress.CompressionRatioDecodingPress(press, 7),
    "CriticalAdaKVPress": kvpress.CriticalAdaKVPress,
    "CriticalKVPress": kvpress.CriticalKVPress,
    "DMSPress": lambda press: kvpress.DMSPress(press, threshold=0.0, sliding_window_size=20, decoding=True),
    "DecodingPress": lambda press: kvpress.DecodingPress(press, 7, 40, 0),
    "DecodingPress of AdaKVPress": lambda press: kvpress.DecodingPress(kvpress.AdaKVPress(press), 7, 40, 0),
    "EntropyGatedChunkKVPress": kvpress.EntropyGatedChunkKVPress,
    "KeyRerotationPress": kvpress.KeyRerotationPress,
    "LUKVPress": kvpress.LUKVPress,
    "MergingPress": kvpress.MergingPress,
    "PerLayerCompressionPress": lambda press: kvpress.PerLayerCompressionPress(press, [0.5, 0.3, 0.6]),
    "PrefillDecodingPress": lambda press: kvpress.PrefillDecodingPress(press, kvpress.DecodingPress(press, 7, 40, 0)),
}
# Those with which it cannot be, and what is said.
REFUSED = {
    "DecodingPress of AdaKVPress": (PipelineError, "or their keys overwritten, before the policy saw them"),
    "LUKVPress": (KeyError, "No LU-KV budget curve found"),
}
# Random weights have no key that all queries look away from, which the masks of this one need from the second pass on.
PROMPT_ALONE = {"CriticalAdaKVPress"}
# They do not show their model to the press within.
SILENT = {"CriticalAdaKVPress", "PerLayerCompressionPress"}


def test_every_wrapper_is_tested() -> None:
    takers = {
        name
        for name, found in vars(kvpress).items()
        if inspect.isclass(found)
        and dataclasses.is_dataclass(found)
        and any(word in str(field.type) for field in dataclasses.fields(found) for word in ("ScorerPress", "BasePress"))
    }
    assert takers | {"CriticalKVPress", "PrefillDecodingPress"} == {name.partition(" ")[0] for name in WRAPPERS}


@dataclasses.dataclass
class Log:
    """What came into a cache and what agents were shown."""

    written: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)
    shown: list[tuple[int, CachedTokens]] = dataclasses.field(default_factory=list)


@contextmanager
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    log = Log()
    update, score = DynamicLayer.update, Policy.score

    def logged_update(self: DynamicLayer, keys: Tensor, values: Tensor, *rest: Any) -> Any:
        log.written.setdefault(id(self), []).append(keys[0].clone())
        return update(self, keys, values, *rest)

    def logged_score(self: Policy, tokens: CachedTokens, layer: Any = None) -> Tensor:
        log.shown.append((layer, tokens))
        return score(self, tokens, layer)

    with monkeypatch.context() as patch:
        patch.setattr(DynamicLayer, "update", logged_update)
        patch.setattr(Policy, "score", logged_score)
        yield log


def speak(model: PreTrainedModel, press: Any, cache: DynamicCache, prompt: Tensor = PROMPT, new: int = 60) -> None:
    with press(model):
        model.generate(
            prompt[None], past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )


@pytest.mark.parametrize("name", sorted(set(WRAPPERS) - set(REFUSED)))
def test_agents_see_where_a_token_stands(
    name: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = make_model("llama"), KVPPress(0.5, saved(tmp_path))
    press = WRAPPERS[name](own)
    if name in SILENT:
        own.post_init_from_model(model)
    with logged(monkeypatch) as log:
        for prompt in (PROMPT, PROMPT.flip(0)):  # one text after the other with one press
            assert_true_positions(log, model, press, prompt, new=1 if name in PROMPT_ALONE else 60)


def assert_true_positions(log: Log, model: PreTrainedModel, press: Any, prompt: Tensor, new: int = 60) -> None:
    cache = DynamicCache()
    log.written.clear()
    log.shown.clear()
    speak(model, press, cache, prompt, new)
    written = {index: torch.cat(log.written[id(layer)], dim=1) for index, layer in enumerate(cache.layers)}
    assert {layer for layer, _ in log.shown} == set(written)
    for layer, tokens in log.shown:
        assert tokens.positions.shape == tokens.keys.shape[:2]
        truth = written[layer].gather(1, tokens.positions[..., None].expand_as(tokens.keys))
        assert torch.equal(truth, tokens.keys)
        assert (tokens.positions < tokens.cache_size).all()
    # Of a prompt, or of it and what was written since the last time.
    sizes = {int(tokens.cache_size.max()) for _, tokens in log.shown}
    assert sizes <= {len(prompt) + more for more in range(new)}
    assert all((tokens.cache_size == tokens.cache_size[0, 0]).all() for _, tokens in log.shown)


def test_texts_one_after_the_other_within_one_press(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That begin alike, so that their first keys are the same; the prompts are not ranked."""
    model, own = make_model("llama"), KVPPress(0.0, saved(tmp_path))
    press = kvpress.DecodingPress(own, 7, 40, 0)
    prompts = PROMPT, torch.cat([PROMPT[:50], PROMPT[:200].flip(0)])
    with logged(monkeypatch) as log, press(model):
        for prompt in prompts:
            assert_true_positions(log, model, lambda _: nullcontext(), prompt)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        speak(make_model("llama"), WRAPPERS[name](KVPPress(0.5, saved(tmp_path))), DynamicCache())


@pytest.mark.parametrize("name", sorted(SILENT))
def test_a_model_that_is_not_shown_is_asked_for(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"call press\.post_init_from_model\(model\) of the KVPPress before"):
        speak(make_model("llama"), WRAPPERS[name](KVPPress(0.5, saved(tmp_path))), DynamicCache())


EVICTED_BEFORE: dict[str, Callable[[KVPPress], Any]] = {
    "while decoding": lambda own: kvpress.PrefillDecodingPress(
        kvpress.KnormPress(0.5), kvpress.DecodingPress(own, 7, 40, 0)
    ),
    "in order of scores": lambda own: kvpress.ComposedPress([kvpress.KnormPress(0.3), own]),
    "the middle": lambda own: kvpress.ComposedPress([kvpress.StreamingLLMPress(0.3), own]),
    "and rotated": lambda own: kvpress.ComposedPress([kvpress.KeyRerotationPress(kvpress.KnormPress(0.3)), own]),
    "by another policy": lambda own: kvpress.ComposedPress([KVPPress(0.3, own.policy_directory), own]),
}


@pytest.mark.parametrize("how", EVICTED_BEFORE)
def test_what_another_press_has_evicted_is_missed(how: str, make_model: MakeModel, tmp_path: Path) -> None:
    press = EVICTED_BEFORE[how](KVPPress(0.5, saved(tmp_path)))
    with pytest.raises(
        PipelineError, match="Tokens were evicted, or their keys overwritten, before the policy saw them"
    ):
        speak(make_model("llama"), press, DynamicCache())


def test_a_press_may_rank_twice(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = KVPPress(0.5, saved(tmp_path))
    with logged(monkeypatch) as log:
        assert_true_positions(log, make_model("llama"), kvpress.ComposedPress([own, own]), PROMPT)


@pytest.mark.parametrize("name", ["AdaKVPress", "ChunkPress"])
def test_layers_that_slide_are_refused_within_a_wrapper(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    press = WRAPPERS[name](KVPPress(0.5, saved(tmp_path, layers=2)))
    model = make_model("gemma3")
    with pytest.raises(PipelineError, match="Layer 0 slides over a window and keeps it, but this press of kvp"):
        speak(model, press, DynamicCache(config=model.config))


def test_pads_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model, mask = make_model("llama"), torch.ones(2, len(PROMPT), dtype=torch.long)
    mask[1, :30] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with (
        pytest.raises(PipelineError, match="kvpress knows no pads"),
        torch.no_grad(),
        KVPPress(0.5, saved(tmp_path))(model),
    ):
        model(PROMPT.expand(2, -1), attention_mask=mask, position_ids=positions, past_key_values=DynamicCache())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_keys_are_found_wherever_they_stand(data: st.DataObject) -> None:
    """Any tokens are dropped, and what is left is put in any order, each time some more have come."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    seen, kv_heads = SeenKeys(), 2
    keys = torch.empty(1, kv_heads, 0, 4, dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    places, length = torch.empty(1, kv_heads, 0, dtype=torch.int64), 0
    for _ in range(data.draw(st.integers(1, 5))):
        more = data.draw(st.integers(1, 9))
        new = torch.randn(1, kv_heads, more, 4, generator=generator).to(keys.dtype)
        positions = torch.arange(length, length + more)
        keys = torch.cat([keys, new], dim=2)
        places = torch.cat([places, positions.expand(1, kv_heads, -1)], dim=2)
        length += more
        cache = SimpleNamespace(get_seq_length=lambda layer, held=keys.shape[2]: held)
        kwargs = {"hidden_states": torch.zeros(1), "position_ids": positions[None], "past_key_values": cache}
        found, size = seen.places(keys, kwargs, 0)
        assert torch.equal(found, places)
        assert size == length
        count = keys.shape[2]
        kept = torch.stack([torch.randperm(count, generator=generator) for _ in range(kv_heads)])
        kept = kept[None, :, : data.draw(st.integers(0, count))]
        keys, places = keys.gather(2, kept[..., None].expand(-1, -1, -1, 4)), places.gather(2, kept)
