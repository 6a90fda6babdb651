"""A trained policy as a kvpress press: use it wherever kvpress is used."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kvpress import ScorerPress
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.models.layers import RankedLayer, layer_number
from pipeline.models.layout import CacheLayout, cache_layout
from pipeline.models.load import head_shape
from pipeline.policy.agents import Policy, load_policy


@dataclass
class KVPPress(ScorerPress):  # type: ignore[misc]  # kvpress is untyped
    """Keeps the tokens that a trained policy scores highest.

    Parameters
    ----------
    compression_ratio
        Fraction of key-value pairs to remove during compression.
    policy_directory
        A directory written by the train stage (policies/<model>/<trained_on>/<estimator>).
    n_sink, n_recent
        Tokens at the start and end that are always kept.

    Examples
    --------
    >>> press = KVPPress(compression_ratio=0.75, policy_directory="policies/smollm2-135m/ruler/exact")
    >>> with press(model):
    ...     model(input_ids, past_key_values=cache)
    """

    policy_directory: str | Path = ""
    n_sink: int = 4
    n_recent: int = 16
    policy: Policy = field(init=False, repr=False)
    layout: CacheLayout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy, _ = load_policy(Path(self.policy_directory))

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
        scores = torch.stack([self.policy(*states, layer=layer) for states in zip(keys, values, strict=True)])
        scores[..., : self.n_sink] = float("inf")
        scores[..., max(scores.shape[-1] - self.n_recent, 0) :] = float("inf")
        return scores

    def _index(self, module: nn.Module) -> RankedLayer | None:
        """The index of a layer among the ranked ones, None for one that slides over a window."""
        number = layer_number(module)
        ranked = self.layout.ranked
        return RankedLayer(ranked.index(number)) if number in ranked else None
