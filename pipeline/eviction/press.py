"""A trained policy as a kvpress press: use it wherever kvpress is used."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kvpress import ScorerPress
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.eviction.positions import LOST, SeenKeys
from pipeline.models.layers import RankedLayer, layer_number
from pipeline.models.layout import CacheLayout, cache_layout
from pipeline.models.load import head_shape
from pipeline.policy.agents import Policy
from pipeline.policy.inputs.base import CachedTokens


@dataclass
class KVPPress(ScorerPress):  # type: ignore[misc]  # kvpress is untyped
    """Keeps the tokens that a trained policy scores highest.

    Parameters
    ----------
    compression_ratio
        Fraction of key-value pairs to remove during compression.
    policy_directory
        A directory written by the train stage (policies/<model>/<trained_on>/<estimator>), or a repository of the hub.
    revision
        Of a repository: a commit.
    n_sink, n_recent
        Tokens at the start and end that are always kept.

    Notes
    -----
    Inside kvpress's wrappers too, agents see where in the text a token stands, and how long the text is, whatever was
    evicted before (``pipeline/eviction/positions.py``).

    Examples
    --------
    >>> press = KVPPress(compression_ratio=0.75, policy_directory="policies/smollm2-135m/ruler/exact")
    >>> with press(model):
    ...     model(input_ids, past_key_values=cache)
    """

    policy_directory: str | Path = ""
    n_sink: int = 4
    n_recent: int = 16
    revision: str | None = None
    policy: Policy = field(init=False, repr=False)
    layout: CacheLayout | None = field(default=None, init=False, repr=False)
    seen: defaultdict[RankedLayer, SeenKeys] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy = Policy.from_pretrained(self.policy_directory, self.revision)
        self.seen = defaultdict(SeenKeys)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, **options: Any) -> "KVPPress":
        """A press of a policy, see :meth:`pipeline.policy.agents.Policy.from_pretrained`; ``options`` are fields."""
        return cls(policy_directory=source, revision=revision, **options)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Check that the policy fits the model and move it to the model's device."""
        body: Any = getattr(model, "model", None)
        if not hasattr(getattr(body, "language_model", body), "layers"):
            raise PipelineError(
                f"kvpress cannot be used with {type(model).__name__}: it looks for model.model.layers; evaluate the "
                "policy with the pipeline instead."
            )
        shape = self.policy.shape
        ranked, found = (shape.layers, shape.kv_heads, shape.head_dim), head_shape(model)
        if ranked != found:
            ours, theirs = ("{} layers x {} KV heads of dimension {}".format(*sizes) for sizes in (ranked, found))
            raise PipelineError(
                f"{self.policy_directory} ranks {ours}, but the model has {theirs}; train a policy for this model."
            )
        self.policy.to(model.device)
        self.layout = cache_layout(model)
        self.seen.clear()

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the kept tokens; a layer that slides over a window keeps all it has."""
        if self._index(module) is None:
            return keys, values
        compressed: tuple[Tensor, Tensor] = super().compress(module, hidden_states, keys, values, attentions, kwargs)
        return compressed

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Scores of shape (batch, kv_heads, tokens), float32, higher = keep; protected tokens are +inf."""
        layer = self._index(module)
        if layer is None:
            raise PipelineError(
                f"Layer {layer_number(module)} slides over a window and keeps it, but this press of kvpress evicts "
                "there, too; use KVPPress alone, or a model without such layers."
            )
        if keys.shape[2] > 1 and getattr(module, "masked_key_indices", None) is not None:
            raise PipelineError(LOST)  # kvpress has written others into the cache in place of the masked ones
        positions, length = self.seen[layer].places(keys, kwargs, layer_number(module))
        texts = zip(keys, values, positions, strict=True)
        scores = torch.stack(
            [
                self.policy.score(CachedTokens(*states, torch.full_like(states[2][:1], length)), layer)
                for states in texts
            ]
        )
        protected = (positions < self.n_sink) | (positions >= length - self.n_recent)
        return scores.masked_fill(protected, float("inf"))

    def _index(self, module: nn.Module) -> RankedLayer | None:
        """The index of a layer among the ranked ones, None for one that slides over a window."""
        if self.layout is None:
            raise PipelineError(
                "This press of kvpress does not show its model to the policy; call press.post_init_from_model(model) "
                "of the KVPPress before."
            )
        number, ranked = layer_number(module), self.layout.ranked
        return RankedLayer(ranked.index(number)) if number in ranked else None
