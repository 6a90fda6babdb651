"""From the baselines of params.yaml to rankings: every press of kvpress ranks a cache, or is refused in a sentence."""

from dataclasses import replace
from typing import Any

import kvpress
import pytest
import torch
from kvpress import ScorerPress

from pipeline.errors import PipelineError
from pipeline.eviction.baselines.base import OBSERVED_QUERIES, OWN, Baseline, LayerCache, OwnBaseline
from pipeline.eviction.rankers import Ranker, make_rankers
from pipeline.models.layers import ModelLayer
from tests.eviction.prefills import RANKERS

# All that kvpress has, our own list of them aside.
SCORERS = sorted(
    name
    for name in dir(kvpress)
    if isinstance(kind := getattr(kvpress, name), type) and issubclass(kind, ScorerPress) and kind is not ScorerPress
)
# What a press says that has no one order of a cache, or looks at more than it is shown.
REFUSED = {
    "StreamingLLMPress": "scores a cache otherwise for another compression ratio",
    "RandomPress": "scores a cache otherwise for another compression ratio, or by chance",
    "ObservedAttentionPress": "looks at the attention of earlier queries than the last 64",
}
SCORED = {"CURPress", "KeyDiffPress", "KnormPress", "LagKVPress", "PyramidKVPress", "SnapKVPress", "TOVAPress"}
LOOKS = {"PyramidKVPress", "SnapKVPress", "TOVAPress"}
N = 280


def cache(n: int = N) -> LayerCache:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, n, 16, generator=generator) for _ in range(2))
    attention = torch.rand(6, min(n, OBSERVED_QUERIES), n, generator=generator).softmax(-1)
    return LayerCache(ModelLayer(0), keys, values, attention, 0)


def make(**section: Any) -> Ranker:
    return make_rankers({"mine": Baseline(**{"sees_attention": True} | section)})["mine"]


def test_the_presses_are_those_that_are_known() -> None:
    assert SCORED | REFUSED.keys() <= set(SCORERS)


@pytest.mark.parametrize("press", SCORERS)
def test_every_press_ranks_a_cache_or_is_refused_in_one_sentence(press: str) -> None:
    if press in SCORED:
        scores = make(press=press)(cache())
        assert (scores.shape, scores.dtype) == ((2, N), torch.float32)
        assert scores.isfinite().all()
        assert all(len(head.unique()) > 20 for head in scores)
        return
    with pytest.raises(PipelineError, match=r"^baselines\.mine.*\.$") as caught:
        make(press=press)(cache())
    assert "\n" not in str(caught.value)
    assert REFUSED.get(press, "") in str(caught.value)


@pytest.mark.parametrize("press", sorted(LOOKS))
def test_a_press_that_looks_at_attention_must_say_so(press: str) -> None:
    with pytest.raises(
        PipelineError, match=r"baselines\.mine cannot score a cache without attention \(sees_attention is"
    ) as caught:
        make(press=press, sees_attention=False)(cache())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("press", sorted(SCORED - LOOKS))
def test_a_press_that_does_not_look_ranks_as_well_without_attention(press: str) -> None:
    blind = make(press=press, sees_attention=False)
    assert torch.equal(blind(cache()), make(press=press)(cache()))
    assert torch.equal(blind(replace(cache(), attention=None)), blind(cache()))


def test_a_file_of_ours_that_looks_at_attention_must_say_so() -> None:
    with pytest.raises(PipelineError, match=r"cannot score a cache without attention \(sees_attention is false\)"):
        make(own="snapkv", sees_attention=False)(cache())


def test_options_are_the_press_s_own() -> None:
    assert not torch.equal(
        make(press="SnapKVPress", options={"window_size": 8})(cache()), make(press="SnapKVPress")(cache())
    )
    with pytest.raises(PipelineError, match=r"baselines\.mine\.options do not fit KnormPress \(.*'window'"):
        make(press="KnormPress", options={"window": 8})
    # More queries than a baseline is shown.
    with pytest.raises(PipelineError, match="SnapKVPress looks at the attention of earlier queries than the last 64"):
        make(press="SnapKVPress", options={"window_size": 128})


def test_chance_with_a_seed_is_a_ranking() -> None:
    ranker = make(press="RandomPress", options={"seed": 7}, sees_attention=False)
    state = torch.get_rng_state()
    assert torch.equal(ranker(cache()), ranker(cache()))
    make_rankers({"x": Baseline(press="KnormPress", sees_attention=False)})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("press", ["H2OPress", "ScorerPress", "AdaKVPress", "BasePress", ""])
def test_an_unknown_press_lists_the_known_ones(press: str) -> None:
    with pytest.raises(
        PipelineError, match=rf"baselines\.mine\.press: kvpress has no '{press}' .*; it has CURPress, "
    ) as caught:
        make(press=press)
    assert str(caught.value).endswith(f"it has {', '.join(SCORERS)}.")


def test_an_unknown_file_of_ours_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'h2o' is no baseline of ours; known: lagkv, random, snapkv, streaming_llm"):
        make(own="h2o")
    with pytest.raises(PipelineError, match=f"'h2o' is no baseline of ours; known: {', '.join(OWN.names())}"):
        OWN.load("h2o")


@pytest.mark.parametrize("name", OWN.names())
def test_every_file_of_ours_ranks_a_cache(name: str) -> None:
    found = OWN.load(name)
    assert issubclass(found, OwnBaseline)
    assert found.__module__ == f"pipeline.eviction.baselines.{name}"
    for n in (2, 40, N):
        scores = make(own=name)(cache(n))
        assert (scores.shape, scores.dtype) == ((2, n), torch.float32)
        assert scores.isfinite().all()
    with pytest.raises(PipelineError, match=r"unknown key baselines\.mine\.options\.colour"):
        make(own=name, options={"colour": 1})


def test_options_of_ours_are_read_from_params() -> None:
    scores = make(own="streaming_llm", options={"n_sink": 10})(cache())
    assert (scores[:, :10] == N).all()
    assert (scores[:, 10:] < N).all()
    with pytest.raises(PipelineError, match=r"baselines\.mine\.options\.n_sink: .*greater than 0"):
        make(own="streaming_llm", options={"n_sink": 0})


def test_scores_of_another_shape_are_refused() -> None:
    ranker = replace(RANKERS["knorm"], scores=lambda shown: torch.zeros(1, 3))
    with pytest.raises(
        PipelineError, match=r"baselines\.knorm gives scores of shape \(1, 3\) for a cache of \(2, 280\)"
    ):
        ranker(cache())


def test_only_who_says_so_is_shown_attention() -> None:
    seen: list[bool] = []

    def look(shown: LayerCache) -> torch.Tensor:
        seen.append(shown.attention is not None)
        return torch.zeros(2, N)

    for sees in (True, False):
        Ranker("mine", sees, look)(cache())
    assert seen == [True, False]
