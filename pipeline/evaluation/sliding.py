"""The cache of a layer that slides over a window, for many rows of one sample. It knows no eviction.

Such a layer is never evicted, so all rows continue from the same tokens: they are held once, and each row
holds only what it has appended itself.
"""

import torch
from torch import Tensor

from pipeline.models.attention import attention_weights, shared_heads


class SlidingLayer:
    """What one sliding layer holds while rows are decoded together.

    Parameters
    ----------
    window
        Tokens that a query sees, itself included.
    keys, values
        (kv_heads, p, head_dim): the last p tokens before the first appended one, at least the window - 1 of them
        that it sees (or all there are).
    """

    def __init__(self, window: int, keys: Tensor, values: Tensor) -> None:
        self.window, self.keys, self.values = window, keys, values
        self._own: tuple[Tensor, Tensor] | None = None  # (rows, kv_heads, appended, head_dim), keys and values

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values occupy."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *(self._own or ())))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the new states of every row, (rows, kv_heads, t, head_dim)."""
        new = (keys, values)
        if self._own is not None:
            new = (torch.cat([self._own[0], keys], dim=2), torch.cat([self._own[1], values], dim=2))
        self._own = new

    def rewind(self, appended: int) -> None:
        """Forget all but the first ``appended`` new tokens."""
        if self._own is not None:
            self._own = (self._own[0][:, :, :appended], self._own[1][:, :, :appended])

    def select(self, keep: Tensor) -> None:
        """Drop finished rows: ``keep`` is (rows,) bool."""
        if self._own is not None:
            self._own = (self._own[0][keep], self._own[1][keep])

    def attend(
        self, query: Tensor, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention of the newest tokens, which were appended before.

        Parameters
        ----------
        query
            (rows, heads, t, head_dim).
        softcap, sinks
            As in :func:`pipeline.models.attention.attention_weights`; sinks are (heads,).

        Returns
        -------
        (rows, heads, t, head_dim)
        """
        assert self._own is not None
        keys, values = self._own
        rows, heads, new, head_dim = query.shape
        kv_heads, shared, _ = self.keys.shape
        # The query heads of a group become further queries of its KV head.
        stacked = query.reshape(rows, kv_heads, heads // kv_heads * new, head_dim)
        logits = torch.cat(
            [torch.einsum("rhqd,hsd->rhqs", stacked, self.keys), stacked @ keys.transpose(2, 3)], dim=-1
        ).mul_(scaling)
        tokens = logits.shape[-1]
        position = torch.arange(tokens - new, tokens, device=query.device)[:, None]
        token = torch.arange(tokens, device=query.device)
        hidden = (token > position) | (token <= position - self.window)  # (t, tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = attention_weights(
            logits, hidden.repeat(heads // kv_heads, 1), softcap, shared_heads(sinks, kv_heads, new)
        ).to(values.dtype)
        output = torch.einsum("rhqs,hsd->rhqd", weights[..., :shared], self.values) + weights[..., shared:] @ values
        return output.reshape(query.shape)
