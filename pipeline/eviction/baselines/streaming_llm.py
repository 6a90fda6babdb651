"""StreamingLLM: attention sinks, then the most recent tokens."""

import torch
from torch import Tensor

from pipeline.eviction.baselines.base import LayerCache, OwnBaseline
from pipeline.section import PositiveInt


class StreamingLLM(OwnBaseline):
    """kvpress scores it for one compression ratio only; its full ranking is spelled out here."""

    n_sink: PositiveInt = 4

    def score(self, cache: LayerCache) -> Tensor:
        """See :meth:`OwnBaseline.score`."""
        kv_heads, tokens = cache.keys.shape[:2]
        scores = torch.arange(tokens, device=cache.keys.device, dtype=torch.float32)
        scores[: self.n_sink] = tokens
        return scores.expand(kv_heads, tokens)
