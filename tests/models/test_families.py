"""Every model family goes all the way: traces, two steps of training, the sweep, the press."""

from pathlib import Path
from statistics import fmean

import polars as pl
import pytest
import torch
from transformers import DynamicCache

from pipeline.evaluation.answers import cost_table
from pipeline.evaluation.sweep import Sweep
from pipeline.eviction.budget import EvaluationParams
from pipeline.eviction.press import KVPPress
from pipeline.models.layers import full_attention_layers
from pipeline.models.load import head_shape
from pipeline.policy.agents import AgentParams, load_policy
from pipeline.policy.card import model_card
from pipeline.policy.estimators.exact import Exact
from pipeline.policy.train import TrainParams, describe, train_policy
from pipeline.samples.sample import Sample, Split
from pipeline.tables import FULL, PolicyKey
from pipeline.traces.build import build_traces
from pipeline.traces.params import TracesParams
from pipeline.traces.shards import ExampleReader
from tests.conftest import FAMILIES, MakeModel

TRACES = TracesParams(cuts=2, at_prompt_end=0.5, tokens=20, sequences_per_shard=2, seed=0)
TRAIN = TrainParams(
    agent=AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "position")),
    steps=2,
    batch_size=3,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    warmup_steps=0,
    warmup_factor=1.0,
    gradient_clip=5.0,
    weight_decay=0.0,
    validate_every=2,
    checkpoint_every=2,
    seed=0,
)
KEY = PolicyKey("kvp-exact", "dialogues")


def sample(split: Split, number: int) -> Sample:
    """A prompt of 200 tokens and a reply of 8; no token twice in a row."""
    ids = tuple(((torch.arange(208) * 37 + number) % 125 + 3).tolist())
    return Sample(f"{split}-{number}", "dialogues", "dialogues", split, ids, 200, None, (), 0, "{}", ("likelihood",))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_policy_is_trained_for_two_steps_and_used(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(family)
    layers, kv_heads, _ = head_shape(model)
    splits: dict[Split, list[Sample]] = {
        "train": [sample("train", number) for number in range(3)],
        "validation": [sample("validation", 3)],
    }
    build_traces(tmp_path / "traces", model, family, "dialogues", splits, TRACES, lambda count: None)
    reader, validation = (ExampleReader(tmp_path / "traces", split, 0) for split in splits)
    config = describe(TRAIN, reader, Exact()) | {"trace_fingerprint": "0" * 64}
    train_policy(tmp_path / "policy", reader, validation, Exact(), TRAIN, config, "cpu", lambda step, status: None)
    numbers = full_attention_layers(model.config)
    curves = pl.read_parquet(tmp_path / "policy/curves.parquet")
    assert set(curves.select("layer", "kv_head").iter_rows()) == {(n, h) for n in numbers for h in range(kv_heads)}

    policy, _ = load_policy(tmp_path / "policy", family)
    budgets = EvaluationParams(budgets=(32, 200), n_sink=4, n_recent=16, seed=0)
    sweep = Sweep(model, None, {KEY: policy}, {}, budgets, budgets.budgets)  # type: ignore[arg-type]  # no text is decoded
    said, costs = sweep.run(sample("test", 4), seed=0)
    nll = {(found.key, found.budget): fmean(found.nll) for found in said}
    assert nll[KEY, 200] == pytest.approx(nll[FULL, None], rel=1e-4)
    assert nll[KEY, 32] != pytest.approx(nll[FULL, None], rel=1e-3)
    table = cost_table(family, sample("test", 4), costs, sweep.layout.ranked)
    assert tuple(table["layer"].unique().sort()) == numbers

    cache = DynamicCache(config=model.config)
    with torch.no_grad(), KVPPress(0.5, tmp_path / "policy")(model):
        model(torch.tensor(sample("test", 4).input_ids[:200])[None], past_key_values=cache)
    assert [cache.layers[number].keys.shape[2] for number in numbers] == [100] * layers
    card = model_card(tmp_path / "policy")
    assert ("| ranked layers | 1, 3 of the model;" in card) == (family == "gemma3")
