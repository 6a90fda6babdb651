"""How many tokens stand before a token."""

import torch
from torch import Tensor

from pipeline.policy.inputs.base import AgentInput, CachedTokens


class Position(AgentInput):
    """log1p(tokens before) / 8: defined at every length, of order 1 from the first token to 100k."""

    def width(self, head_dim: int) -> int:
        """One number."""
        return 1

    def of(self, tokens: CachedTokens) -> Tensor:
        """See :meth:`AgentInput.of`."""
        return (torch.log1p(tokens.positions.float()) / 8)[..., None]
