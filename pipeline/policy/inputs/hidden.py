"""The hidden state that a layer computes key and value from. No cache holds it: it is for the sensitivity study."""

from typing import ClassVar

from torch import Tensor

from pipeline.policy.inputs.base import AgentInput, CachedTokens


class Hidden(AgentInput):
    """All its channels."""

    normalised: ClassVar[bool] = True
    cached: ClassVar[bool] = False

    def width(self, head_dim: int) -> int:
        """One number per channel of what stands in the keys' place."""
        return head_dim

    def of(self, tokens: CachedTokens) -> Tensor:
        """Where there are hidden states, they come in the keys' place (``studies/sensitivity/hidden.py``)."""
        return tokens.keys
