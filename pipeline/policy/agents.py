"""The agents: one small MLP per (layer, KV head), all of a model stacked and run with bmm.

Layers are those that attend to the whole context, counted among themselves
(``pipeline/models/layers.py`` has their numbers in the model).

An agent sees the key, the value and the position of a token as they stand in the cache, and nothing
else: no query, no attention weight, no future token (paper, section "Policy"). Heads are numbered
layer-major: head = layer * kv_heads + kv_head. This file knows no training and no language model.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.errors import PipelineError, one_line
from pipeline.files import atomic_write, write_json
from pipeline.models.layers import ModelLayer, RankedLayer
from pipeline.policy.inputs.base import INPUTS, AgentInput, CachedTokens
from pipeline.section import PositiveInt, Section

WEIGHTS_FILE, CONFIG_FILE = "policy.safetensors", "config.json"
# Hidden units of one layer that are computed at once. On two CPU cores a training step of 90 agents on 960 tokens
# takes half the time that it takes without blocks: memory is used again while it is in the cache.
UNITS_PER_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 28}


class AgentParams(Section):
    """Shape of one agent: an MLP from ``inputs``, what it sees of a token (``pipeline/policy/inputs``), to a score."""

    hidden_width: PositiveInt
    hidden_layers: PositiveInt
    inputs: Annotated[tuple[str, ...], Field(min_length=1)]

    @field_validator("inputs")
    @classmethod
    def _known(cls, inputs: tuple[str, ...]) -> tuple[str, ...]:
        for name in inputs:
            if name not in INPUTS.names():
                raise ValueError(f"'{name}' is no {INPUTS.what}; known: {', '.join(INPUTS.names())}")
        if len(set(inputs)) < len(inputs):
            raise ValueError("an input is named twice")
        return inputs

    @property
    def seen(self) -> list[AgentInput]:
        """The inputs, in their order."""
        return [INPUTS.load(name)() for name in self.inputs]


@dataclass(frozen=True)
class PolicyShape:
    """What a policy's tensors are shaped by: the model's cache and the agent.

    ``head_dim`` is the width of the vectors that its agents see, that of a hidden state where they see those.
    """

    layers: int
    kv_heads: int
    head_dim: int
    agent: AgentParams

    @property
    def heads(self) -> int:
        """Number of agents."""
        return self.layers * self.kv_heads

    @property
    def channels(self) -> int:
        """Numbers that an agent sees of a token after they were normalised."""
        return sum(entry.width(self.head_dim) for entry in self.agent.seen if entry.normalised)

    @property
    def widths(self) -> list[int]:
        """Layer widths of one agent, from input to score."""
        inputs = sum(entry.width(self.head_dim) for entry in self.agent.seen)
        return [inputs, *[self.agent.hidden_width] * self.agent.hidden_layers, 1]

    @property
    def parameters_per_agent(self) -> int:
        """Trained parameters of one agent, biases included."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in zip(self.widths, self.widths[1:], strict=False))


class Policy(nn.Module):
    """All agents of one model.

    Parameters
    ----------
    shape
        Sizes.
    generator
        Source of the initial weights; None leaves them at zero, to be loaded.

    Notes
    -----
    Of its inputs, in their order, those that are to be normalised are: per head and number with ``mean`` and
    ``std``, taken from the training traces and stored in the checkpoint.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: PolicyShape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        # The model's numbers of the layers; others where a trained policy says so.
        self.layer_numbers = tuple(ModelLayer(number) for number in range(shape.layers))
        # How it was trained: the config of a policy that was loaded.
        self.provenance: dict[str, Any] = {}
        self.shape, self.seen = shape, shape.agent.seen
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(shape.widths, shape.widths[1:], strict=False):
            weight, bias = torch.zeros(shape.heads, fan_in, fan_out), torch.zeros(shape.heads, 1, fan_out)
            if generator is not None:
                # He initialisation for the ReLUs. Equal for all heads only in distribution.
                weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))
        if generator is not None:
            # Start near the uniform ranking: large random scores would have to be unlearned first.
            with torch.no_grad():
                self.weights[-1].mul_(0.1)
        self.register_buffer("mean", torch.zeros(shape.heads, 1, shape.channels))
        self.register_buffer("std", torch.ones(shape.heads, 1, shape.channels))

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, model: str | None = None) -> "Policy":
        """Load a trained policy.

        Parameters
        ----------
        source
            A directory that the train stage or :meth:`save_pretrained` wrote, or a repository of the hub
            (``owner/name``), of which safetensors and JSON are read and nothing is run.
        revision
            Of a repository: the 40 hexadecimal digits of a commit.
        model
            If given, the name (in params.yaml) of the model that the policy must have been trained for.

        Raises
        ------
        PipelineError
            Nothing is there, it cannot be reached or read, or it was trained for another model.
        """
        from pipeline.policy.pretrained import load_pretrained

        return load_pretrained(source, revision, model)

    def save_pretrained(self, directory: str | Path, licence: str | None = None) -> None:
        """Write weights, config, model card and a figure of the costs of the heads into a new or empty directory.

        Raises
        ------
        PipelineError
            The directory holds something, or this policy was neither trained nor loaded.
        """
        from pipeline.policy.pretrained import save_pretrained

        save_pretrained(self, Path(directory), licence)

    def push_to_hub(self, repository: str, licence: str, private: bool = False) -> str:
        """Upload what :meth:`save_pretrained` writes to ``owner/name`` on the hub; returns the commit.

        ``licence`` is the hub's name of one, as "apache-2.0". The token is that of ``hf auth login`` or ``HF_TOKEN``.

        Raises
        ------
        PipelineError
            As :meth:`save_pretrained`, or the hub cannot be reached or refuses.
        """
        from pipeline.policy.pretrained import push_to_hub

        return push_to_hub(self, repository, licence, private)

    def forward(self, keys: Tensor, values: Tensor, layer: RankedLayer | None = None) -> Tensor:
        """Score the tokens of a cache.

        Parameters
        ----------
        keys, values
            (heads, n, head_dim), any floating dtype; the cache holds positions 0 .. n-1. Agents that see hidden
            states find them in place of the keys (``studies/sensitivity/hidden.py``).
        layer
            None for all heads of the model; otherwise ``heads`` are the kv_heads of this layer of the policy.

        Returns
        -------
        (heads, n) float32, higher = keep.
        """
        return self.score(CachedTokens.whole(keys, values), layer)

    def score(self, tokens: CachedTokens, layer: RankedLayer | None = None) -> Tensor:
        """The same of tokens at any positions: those that are left of a cache."""
        if layer is None:
            return torch.cat([self._score(tokens[heads], heads) for heads in self.blocks(tokens.keys.shape[1])])
        return self._score(tokens, slice(layer * self.shape.kv_heads, (layer + 1) * self.shape.kv_heads))

    def _score(self, tokens: CachedTokens, heads: slice) -> Tensor:
        weights, biases = ([parameter[heads] for parameter in each] for each in (self.weights, self.biases))
        inputs = self.inputs(tokens, heads)
        parts = torch.split(inputs, self._at_once(len(inputs)), dim=1)
        return torch.cat([run_agents(weights, biases, part) for part in parts], dim=1)

    def blocks(self, tokens: int) -> list[slice]:
        """All heads in turns: so many at once that their hidden units fit a CPU's cache, or fill a GPU."""
        step = self._at_once(tokens)
        return [slice(first, first + step) for first in range(0, self.shape.heads, step)]

    def _at_once(self, others: int) -> int:
        """How many heads of ``others`` tokens, or tokens of ``others`` heads, are computed at once."""
        limit = UNITS_PER_BLOCK.get(self.mean.device.type, 1 << 24)
        return max(1, limit // max(1, others * self.shape.agent.hidden_width))

    def states(self, tokens: CachedTokens) -> Tensor:
        """What is to be normalised, as it is: (heads, n, channels)."""
        return torch.cat([entry.of(tokens) for entry in self.seen if entry.normalised], dim=-1)

    @torch.no_grad()
    def inputs(self, tokens: CachedTokens, heads: slice) -> Tensor:
        """What the agents of ``heads`` see of these heads' tokens, normalised: (heads, n, inputs) float32."""
        inputs = self.mean.new_empty(*tokens.keys.shape[:2], self.shape.widths[0])
        mean, std = self.mean[heads], self.std[heads]
        first = channel = 0
        for entry in self.seen:
            width = entry.width(self.shape.head_dim)
            # In place: the copies would cost more than the arithmetic.
            column = inputs[..., first : first + width].copy_(entry.of(tokens))
            if entry.normalised:
                statistics = slice(channel, channel + width)
                column.sub_(mean[..., statistics]).div_(std[..., statistics])
                channel += width
            first += width
        return inputs


def run_agents(weights: Sequence[Tensor], biases: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Scores of some agents, (heads, n, inputs) -> (heads, n).

    ``weights`` and ``biases`` are (heads, fan_in, fan_out) and (heads, 1, fan_out), layer by layer.
    """
    hidden, last = inputs, len(weights) - 1
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = _affine(bias, hidden, weight)
        if index != last:
            hidden = torch.relu_(hidden)
    return hidden.squeeze(-1)


def _affine(bias: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    if inputs.device.type != "cpu" or torch.is_grad_enabled():
        return torch.baddbmm(bias, inputs, weight)
    # A batched product gives each thread whole heads: 3 heads keep 2 threads busy for two thirds of the time.
    outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[-1])
    for head in zip(bias, inputs, weight, outputs, strict=True):
        torch.addmm(*head[:-1], out=head[-1])
    return outputs


def save_policy(directory: Path, policy: Policy, config: dict[str, Any]) -> None:
    """Write ``policy.safetensors`` and ``config.json``; ``config`` says where the policy comes from."""
    shape = policy.shape
    payload = save({name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()})
    with atomic_write(directory / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(payload)
    content = config | {
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "agent": shape.agent.model_dump(mode="json"),
        "parameters_per_agent": shape.parameters_per_agent,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    write_json(directory / CONFIG_FILE, content)


def load_policy(
    directory: Path, model: str | None = None, hidden_states: bool = False
) -> tuple[Policy, dict[str, Any]]:
    """Load a policy and its config.

    Parameters
    ----------
    directory
        What the train stage wrote.
    model
        If given, the name of the model whose cache is to be ranked.
    hidden_states
        Whether there are hidden states to give to the policy. A cache holds none.

    Raises
    ------
    PipelineError
        A file is missing, damaged (checksum), or the policy was trained for another model or needs hidden states.
    """
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
        payload = (directory / WEIGHTS_FILE).read_bytes()
        agent = AgentParams.model_validate(config["agent"] | {"inputs": tuple(config["agent"]["inputs"])})
        shape = PolicyShape(config["layers"], config["kv_heads"], config["head_dim"], agent)
        numbers = tuple(map(ModelLayer, config.get("trace_shape", {}).get("layer_numbers", range(shape.layers))))
        checksum, trained_for = config["sha256"], config["model"]
        policy = Policy(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise PipelineError(
            f"{directory} holds no readable policy ({one_line(error)}); run the train stage again."
        ) from None
    if hashlib.sha256(payload).hexdigest() != checksum:
        raise PipelineError(
            f"{directory / WEIGHTS_FILE} does not match the checksum in {CONFIG_FILE}, it was changed; train again."
        )
    if model is not None and trained_for != model:
        raise PipelineError(f"{directory} was trained for {trained_for}, not for {model}; train a policy for {model}.")
    if not hidden_states and not all(entry.cached for entry in agent.seen):
        raise PipelineError(
            f"{directory} ranks tokens by hidden states, which a cache does not hold; train a policy that sees "
            "keys or values (train.agent.inputs)."
        )
    policy.layer_numbers, policy.provenance = numbers, config
    try:
        policy.load_state_dict(load(payload))
    except (SafetensorError, RuntimeError) as error:
        raise PipelineError(
            f"{directory / WEIGHTS_FILE} does not fit its config ({one_line(error)}); train again."
        ) from None
    return policy.eval(), config
