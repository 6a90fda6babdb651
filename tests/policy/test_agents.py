"""Stacked agents against one plain MLP per head, and the checkpoint against damage."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.policy import agents
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, load_policy, save_policy


def make_policy(features: tuple[str, ...] = ("position", "age"), seed: int = 0) -> Policy:
    agent = AgentParams.model_validate({"hidden_width": 16, "hidden_layers": 2, "inputs": ("key", "value", *features)})
    policy = Policy(PolicyShape(layers=3, kv_heads=2, head_dim=8, agent=agent), torch.Generator().manual_seed(seed))
    policy.mean.normal_(generator=torch.Generator().manual_seed(seed + 1))
    policy.std.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(seed + 2))
    return policy


@pytest.mark.parametrize("features", [(), ("position",), ("position", "age")])
@pytest.mark.parametrize("graded", [True, False])
def test_stacked_agents_equal_separate_mlps(features: tuple[str, ...], graded: bool) -> None:
    policy = make_policy(features)
    keys, values = torch.randn(6, 20, 8), torch.randn(6, 20, 8)
    with torch.set_grad_enabled(graded):  # without gradients, a CPU computes them another way
        scores = policy(keys, values)
    for head in range(6):
        for token in range(20):
            inputs = torch.cat([keys[head, token], values[head, token]]).double()
            inputs = (inputs - policy.mean[head, 0].double()) / policy.std[head, 0].double()
            position = {"position": token, "age": 19 - token}
            extra = [torch.log1p(torch.tensor(position[name], dtype=torch.float64)) / 8 for name in features]
            hidden = torch.cat([inputs, torch.tensor(extra, dtype=torch.float64)])
            for index, (weight, bias) in enumerate(zip(policy.weights, policy.biases, strict=True)):
                hidden = hidden @ weight[head].double() + bias[head, 0].double()
                hidden = hidden.relu() if index < 2 else hidden
            assert scores[head, token].item() == pytest.approx(hidden.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("inputs", "seen"), [("key", slice(0, 8)), ("value", slice(8, 16))])
def test_an_agent_of_keys_or_values_is_blind_to_the_other(inputs: str, seen: slice) -> None:
    both = make_policy()
    agent = AgentParams.model_validate(both.shape.agent.model_dump() | {"inputs": (inputs, "position", "age")})
    policy = Policy(PolicyShape(3, 2, 8, agent))
    assert policy.shape.parameters_per_agent == both.shape.parameters_per_agent - 8 * 16
    kept = torch.cat([torch.arange(16)[seen], torch.tensor([16, 17])])  # the position features come last
    state = both.state_dict()
    state |= {name: state[name][..., seen] for name in ("mean", "std")}
    policy.load_state_dict(state | {"weights.0": state["weights.0"][:, kept]})
    both.weights[0].data[:, [channel for channel in range(18) if channel not in kept]] = 0
    keys, values = torch.randn(6, 20, 8), torch.randn(6, 20, 8)
    torch.testing.assert_close(policy(keys, values), both(keys, values))


def test_one_layer_gives_the_same_scores_as_all_layers() -> None:
    policy = make_policy()
    keys, values = torch.randn(6, 20, 8), torch.randn(6, 20, 8)
    torch.testing.assert_close(policy(keys[2:4], values[2:4], layer=1), policy(keys, values)[2:4])


@pytest.mark.parametrize("units", [1, 16 * 7, 16 * 6 * 7])
def test_scores_are_the_same_in_blocks_of_any_size(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    keys, values = torch.randn(6, 20, 8), torch.randn(6, 20, 8)
    whole, layer = policy(keys, values), policy(keys[2:4], values[2:4], layer=1)
    monkeypatch.setitem(agents.UNITS_PER_BLOCK, "cpu", units)
    torch.testing.assert_close(policy(keys, values), whole)
    torch.testing.assert_close(policy(keys[2:4], values[2:4], layer=1), layer)


def test_parameters_are_counted_exactly() -> None:
    policy = make_policy()
    assert policy.shape.parameters_per_agent * policy.shape.heads == sum(p.numel() for p in policy.parameters())
    # A plain 257-256-256-1 MLP, the reading of the paper's "2 layers, 256 hidden units" at head_dim 128.
    agent = AgentParams(hidden_width=256, hidden_layers=2, inputs=("key", "value", "position"))
    assert PolicyShape(28, 4, 128, agent).parameters_per_agent == 132_097


def test_scores_are_defined_far_beyond_the_training_length() -> None:
    policy = make_policy()
    scores = policy(torch.randn(6, 50_000, 8), torch.randn(6, 50_000, 8))
    assert torch.isfinite(scores).all()


def test_a_saved_policy_loads_with_one_call(tmp_path: Path) -> None:
    policy = make_policy()
    save_policy(tmp_path, policy, {"model": "tiny"})
    loaded, config = load_policy(tmp_path, "tiny")
    assert config["parameters_per_agent"] == policy.shape.parameters_per_agent
    keys, values = torch.randn(6, 20, 8), torch.randn(6, 20, 8)
    assert torch.equal(loaded(keys, values), policy(keys, values))


def test_inputs_come_in_the_order_that_they_are_named() -> None:
    one = make_policy()
    other = Policy(
        PolicyShape(3, 2, 8, one.shape.agent.model_copy(update={"inputs": ("age", "value", "key", "position")}))
    )
    state = one.state_dict()
    normalised = torch.cat([torch.arange(8, 16), torch.arange(8)])
    state |= {name: state[name][..., normalised] for name in ("mean", "std")}
    order = torch.cat([torch.tensor([17]), normalised, torch.tensor([16])])
    other.load_state_dict(state | {"weights.0": state["weights.0"][:, order]})
    keys, values = torch.randn(6, 20, 8), torch.randn(6, 20, 8)
    torch.testing.assert_close(other(keys, values), one(keys, values))


@pytest.mark.parametrize(
    "agent",
    [
        {"hidden_width": 16, "hidden_layers": 2, "position_features": ["age"]},
        {"hidden_width": 16, "hidden_layers": 2, "position_features": ["age"], "inputs": "both"},
        {"hidden_width": 16, "hidden_layers": 2, "inputs": ["key", "query"]},
        {"hidden_width": 16, "hidden_layers": 2, "inputs": None},
    ],
)
def test_a_policy_of_agents_that_are_not_known_is_refused(agent: dict[str, object], tmp_path: Path) -> None:
    save_policy(tmp_path, make_policy(), {"model": "tiny"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"agent": agent}))
    with pytest.raises(PipelineError, match=r"holds no readable policy .*; run the train stage again") as caught:
        load_policy(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    save_policy(tmp_path, make_policy(), {"model": "tiny"})
    weights = tmp_path / "policy.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    with pytest.raises(PipelineError, match=r"policy\.safetensors does not match the checksum"):
        load_policy(tmp_path)


def test_a_policy_of_another_model_is_refused(tmp_path: Path) -> None:
    save_policy(tmp_path, make_policy(), {"model": "tiny"})
    with pytest.raises(PipelineError, match="was trained for tiny, not for other; train a policy for other"):
        load_policy(tmp_path, "other")


def test_a_policy_of_hidden_states_ranks_no_cache(tmp_path: Path) -> None:
    agent = AgentParams(hidden_width=16, hidden_layers=2, inputs=("hidden", "age"))
    policy = Policy(PolicyShape(3, 2, 48, agent), torch.Generator().manual_seed(0))
    save_policy(tmp_path, policy, {"model": "tiny"})
    with pytest.raises(PipelineError, match="ranks tokens by hidden states, which a cache does not hold"):
        load_policy(tmp_path, "tiny")
    states = torch.randn(6, 20, 48)
    loaded, _ = load_policy(tmp_path, "tiny", hidden_states=True)
    assert torch.equal(loaded(states, states[..., :0]), policy(states, states[..., :0]))


def test_a_missing_or_mutilated_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="holds no readable policy"):
        load_policy(tmp_path)
    save_policy(tmp_path, make_policy(), {"model": "tiny"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["kv_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="holds no readable policy"):
        load_policy(tmp_path)
