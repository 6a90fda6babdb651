"""SnapKV: attention of a window of last queries, pooled over neighbouring tokens."""

from torch import Tensor

from pipeline.eviction.baselines.base import OBSERVED_QUERIES, LayerCache, OwnBaseline, press_scores


class SnapKV(OwnBaseline):
    """kvpress's. Its window needs tokens before it: in a short cache it is the second half."""

    def score(self, cache: LayerCache) -> Tensor:
        """See :meth:`OwnBaseline.score`."""
        from kvpress import SnapKVPress

        return press_scores(SnapKVPress(window_size=min(OBSERVED_QUERIES, cache.keys.shape[1] // 2)), cache)
