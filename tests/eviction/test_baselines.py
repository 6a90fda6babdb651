"""The baselines against kvpress itself: the tokens its own hooks keep, and the text it goes on to write."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from kvpress import KeyDiffPress, KnormPress, LagKVPress, ScorerPress, SnapKVPress, StreamingLLMPress, TOVAPress
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from pipeline.evaluation.decode import EvictedCache, greedy_decode
from pipeline.eviction.baselines.base import OBSERVED_QUERIES, LayerCache
from pipeline.eviction.budget import gather_tokens, kept_tokens, protected_ranking
from pipeline.eviction.rankers import Ranker
from pipeline.models.layers import ModelLayer, RankedLayer
from pipeline.traces.capture import ObservedLayer, Tails, run_captured
from tests.conftest import MakeModel
from tests.eviction.prefills import PROMPT, RANKERS, compressed, layer_caches, token_indices

PRESSES: dict[str, Callable[[float], ScorerPress]] = {
    "streaming-llm": StreamingLLMPress,
    "lagkv": LagKVPress,
    "keydiff": KeyDiffPress,
    "knorm": KnormPress,
    "snapkv": SnapKVPress,
    "tova": TOVAPress,
}
CASES = [(name, ratio) for name in PRESSES for ratio in (0.1, 0.75)]
# LagKV gives one score to all sinks and tail and one to each rank of every lag; repeated tokens have keys of
# equal norm in the first layer. Which of equal scores stays is up to topk; everything else is fixed.
MAY_TIE = {"lagkv", "knorm"}


def our_tokens(model: PreTrainedModel, ranker: Ranker, budget: int) -> list[Tensor]:
    """Per layer (kv_heads, budget): what our ranking keeps without protecting any token."""
    return [kept_tokens(protected_ranking(ranker(layer), 0, 0), budget) for layer in layer_caches(model, PROMPT[:-1])]


def continue_compressed(model: PreTrainedModel, cache: DynamicCache, count: int) -> list[int]:
    """Greedy tokens after a cache that kvpress compressed; positions go on where the prompt ends."""
    token, tokens = int(PROMPT[-1]), []
    for position in range(len(PROMPT) - 1, len(PROMPT) - 1 + count):
        with torch.no_grad():
            logits = model(
                torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[position]])
            ).logits
        token = int(logits[0, -1].argmax())
        tokens.append(token)
    return tokens


def test_every_baseline_is_compared() -> None:
    assert set(RANKERS) == {*PRESSES, "random"}


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(("name", "ratio"), CASES)
def test_the_kept_tokens_are_those_of_kvpress(name: str, ratio: float, family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    cache = compressed(model, PROMPT[:-1], PRESSES[name](ratio))
    budget = cache.layers[0].keys.shape[2]
    assert budget < len(PROMPT) - 1
    layers = layer_caches(model, PROMPT[:-1])
    for theirs, whole, ours in zip(cache.layers, layers, our_tokens(model, RANKERS[name], budget), strict=True):
        kept = token_indices(theirs.keys[0], whole.keys)
        scores = RANKERS[name](whole)
        if name not in MAY_TIE:
            assert torch.equal(kept, ours)
        for head in range(2):
            threshold = scores[head, ours[head]].min()
            others = set(kept[head].tolist()) ^ set(ours[head].tolist())
            assert torch.allclose(scores[head, sorted(others)], threshold, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", [0.1, 0.4])  # LagKV has no ties at these budgets
@pytest.mark.parametrize("name", PRESSES)
def test_our_decoding_writes_what_kvpress_writes(name: str, ratio: float, make_model: MakeModel) -> None:
    model = make_model("llama")
    theirs = compressed(model, PROMPT[:-1], PRESSES[name](ratio))
    tokens = our_tokens(model, RANKERS[name], theirs.layers[0].keys.shape[2])
    layers = layer_caches(model, PROMPT[:-1])
    ours = EvictedCache(reserve=16)
    ours.add_group(
        [gather_tokens(layer.keys, kept[None]) for layer, kept in zip(layers, tokens, strict=True)],
        [gather_tokens(layer.values, kept[None]) for layer, kept in zip(layers, tokens, strict=True)],
    )
    (written,) = greedy_decode(model, ours, [int(PROMPT[-1])], len(PROMPT) - 1, 16, lambda _: False)
    assert written == continue_compressed(model, theirs, 16)


def test_eviction_changes_what_is_written(make_model: MakeModel) -> None:
    # Otherwise equal text would say nothing about equal caches.
    model = make_model("llama")
    texts = {
        tuple(continue_compressed(model, compressed(model, PROMPT[:-1], PRESSES[name](0.4)), 16))
        for name in ("knorm", "snapkv", "streaming-llm")
    }
    assert len(texts) == 3


def test_random_differs_between_layers_and_seeds_only(make_model: MakeModel) -> None:
    model = make_model("llama")
    one, again, other = (
        torch.stack([RANKERS["random"](layer) for layer in layer_caches(model, PROMPT, seed)]) for seed in (7, 7, 8)
    )
    assert torch.equal(one, again)
    # (layers, kv_heads, n): no two heads, layers or seeds share a ranking
    rankings = torch.cat([one, other]).flatten(0, 1).argsort(-1)
    assert len({tuple(ranking) for ranking in rankings.tolist()}) == len(rankings) == 2 * 3 * 2


def test_streaming_keeps_sinks_and_the_most_recent(make_model: MakeModel) -> None:
    layer = layer_caches(make_model("llama"), PROMPT[:60])[0]
    kept = kept_tokens(protected_ranking(RANKERS["streaming-llm"](layer), 0, 0), 10)
    assert kept.tolist() == [[0, 1, 2, 3, 54, 55, 56, 57, 58, 59]] * 2


def captured(model: PreTrainedModel, tokens: Tensor, size: int) -> list[LayerCache]:
    """The first ``size`` of ``tokens`` as a capture of all of them shows them."""
    found: list[LayerCache] = []

    def observe(index: RankedLayer, layer: ObservedLayer) -> None:
        found.append(LayerCache(layer.number, layer.keys[:, :size], layer.values[:, :size], layer.tails[size], 0))

    run_captured(model, tokens, DynamicCache(), (), Tails((size,), OBSERVED_QUERIES), observe)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("name", RANKERS)
def test_a_prefix_scores_as_a_fresh_prefill(name: str, family: str, make_model: MakeModel) -> None:
    model, size = make_model(family), 270
    for view, fresh in zip(captured(model, PROMPT, size), layer_caches(model, PROMPT[:size]), strict=True):
        torch.testing.assert_close(view.keys, fresh.keys, rtol=1e-3, atol=1e-3)
        scores, expected = RANKERS[name](view), RANKERS[name](fresh)
        assert scores.shape == (2, size)
        assert scores.dtype == torch.float32
        if name == "lagkv":
            # Its scores are ranks within a lag, which rounding may swap between neighbours.
            assert (scores - expected).abs().max() <= 2 / 128
        else:
            torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("constant", ["keys", "values", "one channel", "everything"])
def test_lagkv_scores_channels_that_never_change(constant: str, make_model: MakeModel) -> None:
    (layer, *_) = layer_caches(make_model("llama"), PROMPT)
    keys, values = layer.keys.clone(), layer.values.clone()
    if constant in ("keys", "everything"):
        keys[:] = keys[:, :1]
    if constant in ("values", "everything"):
        values[:] = 0.0
    if constant == "one channel":
        keys[..., 3] = 2.0
    scores = RANKERS["lagkv"](dataclasses.replace(layer, keys=keys, values=values))
    assert torch.isfinite(scores).all()
    if constant != "everything":
        assert len(scores[:, 4:132].unique()) == 128  # the others still tell the tokens of a lag apart


def test_bfloat16_does_not_tie_what_the_cache_tells_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 4096, 64, generator=generator).bfloat16() for _ in range(2))
    cache = LayerCache(ModelLayer(0), keys, values, torch.zeros(2, 1, 4096), 0)
    for name in ("keydiff", "knorm", "random"):
        scores = RANKERS[name](cache)
        assert all(len(head.unique()) > 4000 for head in scores), name
        # The reference sees the same rounded keys, in float64.
        if name == "keydiff":
            exact = keys.double()
            anchor = F.normalize(exact, dim=-1).mean(1, keepdim=True)
            torch.testing.assert_close(scores.double(), -F.cosine_similarity(exact, anchor, dim=-1), rtol=0, atol=1e-6)


def test_scores_are_float32_in_a_bfloat16_model(make_model: MakeModel) -> None:
    model = copy.deepcopy(make_model("llama")).bfloat16()
    for layer in layer_caches(model, PROMPT):
        for name, ranker in RANKERS.items():
            assert ranker(layer).dtype == torch.float32, name


def test_snapkv_has_a_shorter_window_where_the_cache_is_short(make_model: MakeModel) -> None:
    model = make_model("llama")
    for tokens, window in ((2, 1), (30, 15), (128, 64), (140, 64)):
        for cache in layer_caches(model, torch.arange(tokens) * 37 % 125 + 3, seed=0):
            scores = RANKERS["snapkv"](cache)
            assert scores.shape == (2, tokens)
            assert torch.isfinite(scores).all()
            # kvpress puts the window in front by giving it the largest score there is.
            assert (scores[:, -window:] == scores.max()).all()
            assert tokens == 2 or (scores[:, :-window] < scores.max()).any()
