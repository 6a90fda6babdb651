"""What is timed is the real work; how long it takes is no test's business."""

from dataclasses import replace

import polars as pl
import torch

from pipeline.policy.agents import AgentParams, Policy, PolicyShape
from pipeline.policy.ranking import rank
from studies.latency import measure
from tests.conftest import MakeModel

SHAPE = PolicyShape(3, 2, 16, AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "age")))


def test_every_work_is_timed_at_every_length(make_model: MakeModel) -> None:
    policy = Policy(SHAPE, torch.Generator().manual_seed(0))
    done: list[None] = []
    table = measure.measure_latency(make_model("llama"), policy, (32, 64), 2, lambda: done.append(None))
    assert len(done) == 2
    works = {"ranking, one layer", "ranking, all layers", "prefill", "decode step"}
    assert set(table.select("length", "work", "repeat").iter_rows()) == {
        (length, work, repeat) for length in (32, 64) for work in works for repeat in (0, 1)
    }
    assert (table["seconds"] > 0).all()
    assert table.schema["seconds"] == pl.Float64


def test_the_work_that_is_timed_is_done(make_model: MakeModel) -> None:
    model = make_model("llama")
    policy = Policy(SHAPE, torch.Generator().manual_seed(0))
    tokens = torch.arange(40)[None] % 128
    with torch.inference_mode():
        cache = measure._prefill(model, tokens)
        assert cache.get_seq_length() == 40
        states = measure.ranked_states(model, cache)
        rankings = measure._rank_layers(policy, states)
        measure._decode(model, tokens[:, -1:], cache)
    assert cache.get_seq_length() == 41
    assert len(rankings) == 3
    for ranking in rankings:
        assert torch.equal(ranking.sort(-1).values, torch.arange(40).expand(2, 40))


def test_layers_that_slide_over_a_window_are_not_ranked(make_model: MakeModel) -> None:
    model = make_model("gemma3")  # layers 1 and 3 of 4 see the whole context
    policy = Policy(replace(SHAPE, layers=2), torch.Generator().manual_seed(0))
    tokens = torch.arange(64)[None] % 128
    with torch.inference_mode():
        cache = measure._prefill(model, tokens)
        assert [layer.keys.shape[2] for layer in cache.layers] == [23, 64, 23, 64]
        rankings = measure._rank_layers(policy, measure.ranked_states(model, cache))
        for index, number in enumerate((1, 3)):
            keys, values = cache.layers[number].keys[0], cache.layers[number].values[0]
            assert torch.equal(rankings[index], rank(policy(keys, values, layer=index)))
    assert measure.measure_latency(model, policy, (64,), 1)["length"].to_list() == [64] * 4
