"""The key of a token, as it stands in the cache."""

from typing import ClassVar

from torch import Tensor

from pipeline.policy.inputs.base import AgentInput, CachedTokens


class Key(AgentInput):
    """All its channels."""

    normalised: ClassVar[bool] = True

    def width(self, head_dim: int) -> int:
        """One number per channel."""
        return head_dim

    def of(self, tokens: CachedTokens) -> Tensor:
        """See :meth:`AgentInput.of`."""
        return tokens.keys
