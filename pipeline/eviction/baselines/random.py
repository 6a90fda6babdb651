"""A random order: what any ranking must beat."""

import zlib

import torch
from torch import Tensor

from pipeline.eviction.baselines.base import LayerCache, OwnBaseline


class Random(OwnBaseline):
    """kvpress's, of a seed that differs between samples and layers."""

    def score(self, cache: LayerCache) -> Tensor:
        """See :meth:`OwnBaseline.score`."""
        from kvpress import RandomPress

        seed = zlib.crc32(f"{cache.seed}/{cache.number}".encode())
        shape_alone = torch.empty(1, *cache.keys.shape[:2], 0)  # on the CPU: a device must not change the ranking
        scores: Tensor = RandomPress(seed=seed).score(None, None, shape_alone, None, None, {})
        return scores[0].to(cache.keys.device)
