"""How many tokens stand after a token."""

import torch
from torch import Tensor

from pipeline.policy.inputs.base import AgentInput


class Age(AgentInput):
    """log1p(tokens after) / 8: defined at every length, of order 1 from the first token to 100k."""

    def width(self, head_dim: int) -> int:
        """One number."""
        return 1

    def of(self, keys: Tensor, values: Tensor) -> Tensor:
        """See :meth:`AgentInput.of`."""
        tokens = keys.shape[1]
        index = torch.arange(tokens, device=keys.device, dtype=torch.float32)
        return (torch.log1p(tokens - 1 - index) / 8)[:, None]
