"""Policies from and to a directory or a hub: the same scores, a card that says how, or one sentence."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from matplotlib.image import imread

from pipeline.errors import PipelineError
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, load_policy, save_policy
from tests.commands import ENVIRONMENT
from tests.rehearsal import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
AGENT = AgentParams(hidden_width=16, hidden_layers=2, inputs=("key", "value", "position"))
CONFIG: dict[str, Any] = {
    "model": "tiny",
    "trained_on": "dialogues",
    "estimator": "exact",
    "params": {"steps": 30, "learning_rate": 0.01, "seed": 1},
    "trace_shape": {"layer_numbers": [1, 3, 5]},
    "training_sequences": 12,
    "trace_fingerprint": "f" * 64,
    "held_out_cost": [1.5, 1.25, 1.125, 1.0625, 2.0, 1.0],
}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What the train stage leaves."""
    policy = Policy(PolicyShape(3, 2, 8, AGENT), torch.Generator().manual_seed(0))
    save_policy(tmp_path / "trained", policy, CONFIG)
    return tmp_path / "trained"


def assert_same(one: Policy, other: Policy) -> None:
    keys, values = torch.randn(6, 20, 8), torch.randn(6, 20, 8)
    assert torch.equal(one(keys, values), other(keys, values))
    assert one.layer_numbers == other.layer_numbers == (1, 3, 5)


def test_a_directory_holds_weights_config_card_and_figure(trained: Path, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(trained, model="tiny")
    policy.save_pretrained(tmp_path / "saved", "apache-2.0")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "policy.safetensors",
        "config.json",
        "README.md",
        "costs.png",
    }
    assert_same(Policy.from_pretrained(tmp_path / "saved"), policy)
    assert load_policy(tmp_path / "saved")[1] == load_policy(trained)[1]
    card = (tmp_path / "saved/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "# Eviction policy for tiny, trained on dialogues (exact)" in card
    assert "| held-out cost, 1 = the best order | 1.323 (heads: 1.000 to 2.000) |" in card
    assert "| 1 | 1.500 | 1.250 |\n| 3 | 1.125 | 1.062 |\n| 5 | 2.000 | 1.000 |" in card
    assert "![held-out cost of each head](costs.png)" in card
    assert imread(tmp_path / "saved/costs.png").std() > 0


# In a process of its own: the client reads the hub's address when it is imported.
ASK = """
import sys
from pipeline.errors import PipelineError
from pipeline.policy.agents import Policy
for repository, revision in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        Policy.from_pretrained(repository, revision).save_pretrained(sys.argv[1])
        print("saved")
    except PipelineError as error:
        print(error)
"""


def ask(space: Path, address: str, out: str, *repositories: str) -> list[str]:
    """Load each repository at its revision, save it to ``out``; what is said of each."""
    environment = ENVIRONMENT | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "DVC_ROOT": str(space)}
    command = [sys.executable, "-c", ASK, str(space / out), *repositories]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_repository_is_read_at_a_commit(trained: Path, tmp_path: Path) -> None:
    policy, other = Policy.from_pretrained(trained), "9" * 40
    policy.save_pretrained(hub.place(tmp_path / "hub", hub.MODELS, "owner/policy", COMMIT))
    with hub.served(tmp_path / "hub") as address:
        saved, revision, name = ask(
            tmp_path, address, "first", "owner/policy", COMMIT, "owner/policy", other, "owner/other", COMMIT
        )
    assert saved == "saved"
    assert revision == f"hub:owner/policy has no revision {other}; correct it."
    assert name.startswith("hub:owner/other is neither a model nor a data set on the hub")
    assert_same(Policy.from_pretrained(tmp_path / "first"), policy)
    # What was fetched once needs no hub.
    assert ask(tmp_path, address, "second", "owner/policy", COMMIT) == ["saved"]


@pytest.mark.parametrize("revision", [None, "main", "abc"])
def test_a_repository_without_a_commit_is_refused(revision: str | None) -> None:
    with pytest.raises(PipelineError, match="owner/policy is no directory; as a repository of the hub it needs rev"):
        Policy.from_pretrained("owner/policy", revision)


def test_what_is_pushed_is_what_is_saved(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    class Api:
        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
            assert exist_ok
            calls.append((repository, private))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
            assert commit_message
            Path(folder_path).rename(tmp_path / "uploaded")
            Path(folder_path).mkdir()
            calls.append((repo_id, False))
            return SimpleNamespace(oid=COMMIT)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    policy = Policy.from_pretrained(trained)
    assert policy.push_to_hub("owner/policy", "mit", private=True) == COMMIT
    assert calls == [("owner/policy", True), ("owner/policy", False)]
    assert_same(Policy.from_pretrained(tmp_path / "uploaded"), policy)
    assert (tmp_path / "uploaded/README.md").read_text().startswith("---\nlicense: mit\n")


def test_a_hub_that_refuses_is_one_sentence(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(PipelineError, match=r"^owner/policy: the hub did not take the policy \(ConnectionError\)"):
        Policy.from_pretrained(trained).push_to_hub("owner/policy", "mit")


@pytest.mark.parametrize("licence", ["my: own\n- evil: [", "custom: see LICENSE", "", "Apache 2.0"])
def test_a_licence_that_the_hub_would_not_read_is_refused(licence: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="is no licence as the hub names it"):
        Policy.from_pretrained(trained).save_pretrained(tmp_path / "new", licence)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("costs", [[1.5] * 3, [1.5] * 5 + [float("nan")], ["x"] * 6])
def test_costs_that_are_not_those_of_the_heads_are_refused(costs: list[Any], trained: Path, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(trained)
    policy.provenance["held_out_cost"] = costs
    with pytest.raises(PipelineError, match="does not hold a held-out cost of each of 6 heads; train again"):
        policy.save_pretrained(tmp_path / "new")


@pytest.mark.parametrize("change", [{"kv_heads": "3"}, {"trace_shape": []}, {"layers": -1}, {"head_dim": None}])
def test_a_config_that_is_none_is_one_sentence(change: dict[str, Any], trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(PipelineError, match="holds no readable policy") as caught:
        Policy.from_pretrained(trained)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [("", "No policy is named"), ("saved1", "saved1 is no directory, and no repository of the hub")],
)
def test_a_source_that_is_none_is_one_sentence(source: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Policy.from_pretrained(source, COMMIT)


def test_what_cannot_be_saved_is_refused_and_nothing_is_touched(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="Nothing is known of how this policy was trained"):
        Policy(PolicyShape(3, 2, 8, AGENT)).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    old = Policy.from_pretrained(trained)
    del old.provenance["held_out_cost"]
    with pytest.raises(PipelineError, match="config does not say held_out_cost, as of an older version; train again"):
        old.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    with pytest.raises(PipelineError, match="is there already and not empty"):
        Policy.from_pretrained(trained).save_pretrained(trained)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    with pytest.raises(PipelineError, match="is a directory, which has no revisions"):
        Policy.from_pretrained(trained, COMMIT)
