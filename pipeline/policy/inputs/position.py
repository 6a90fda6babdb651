"""How many tokens stand before a token."""

import torch
from torch import Tensor

from pipeline.policy.inputs.base import AgentInput


class Position(AgentInput):
    """log1p(tokens before) / 8: defined at every length, of order 1 from the first token to 100k."""

    def width(self, head_dim: int) -> int:
        """One number."""
        return 1

    def of(self, keys: Tensor, values: Tensor) -> Tensor:
        """See :meth:`AgentInput.of`."""
        index = torch.arange(keys.shape[1], device=keys.device, dtype=torch.float32)
        return (torch.log1p(index) / 8)[:, None]
