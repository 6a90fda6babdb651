"""LagKV: how far a token's key and value lie from those of the partition of tokens after it."""

from torch import Tensor

from pipeline.eviction.baselines.base import LayerCache, OwnBaseline, press_scores


class LagKV(OwnBaseline):
    """kvpress's, but for channels in which a partition has one value only: there it divides by 0."""

    def score(self, cache: LayerCache) -> Tensor:
        """See :meth:`OwnBaseline.score`."""
        from kvpress import LagKVPress

        class Press(LagKVPress):  # type: ignore[misc]  # kvpress is untyped
            def _get_states_score(self, target_v: Tensor) -> Tensor:
                # (1, kv_heads, partitions, lag, head_dim)
                reference, scored = target_v[:, :, 1:], target_v[:, :, :-1]
                smallest, largest = reference.amin(-2, keepdim=True), reference.amax(-2, keepdim=True)
                # Such a channel tells no tokens of the partition before it apart.
                relative = ((scored - smallest) / (largest - smallest)).masked_fill(largest == smallest, 0.0)
                return relative.std(dim=-1).softmax(dim=-1)

        return press_scores(Press(), cache)
