"""From the future-attention record to the importance of cached tokens. It knows tensors only.

The importance of cached token i at cache size n is the attention it receives from the true tokens that
follow: imp_i = sum over queries j >= n (0-based) of A(i, j), A the maximum over the query heads of the
group (paper, section "Reward"). The record keeps A summed over blocks of queries, so the importance is
exact at every cache size that is a multiple of the block size, and queries need not be stored.
"""

import torch
from pydantic import model_validator
from torch import Tensor

from pipeline.section import PositiveInt, Section


class TracesParams(Section):
    """How attention is captured. ``block_size`` queries make one entry of the future-attention record."""

    block_size: PositiveInt
    query_chunk: PositiveInt
    sequences_per_shard: PositiveInt

    @model_validator(mode="after")
    def _chunk_of_blocks(self) -> "TracesParams":
        if self.query_chunk % self.block_size:
            raise ValueError("query_chunk must be a multiple of block_size")
        return self


def future_importance(record: Tensor, cache_size: int, block_size: int) -> Tensor:
    """Importance of the first ``cache_size`` tokens to everything after them.

    Parameters
    ----------
    record
        (..., tokens, blocks), attention mass per token and block of queries.
    cache_size
        n, a multiple of ``block_size``.

    Returns
    -------
    (..., cache_size) float32

    Raises
    ------
    ValueError
        ``cache_size`` is not a multiple of ``block_size``, or is larger than the sequence.
    """
    if cache_size % block_size or not 0 < cache_size <= record.shape[-2]:
        raise ValueError(f"cache size {cache_size} is no multiple of {block_size} within {record.shape[-2]} tokens")
    return record[..., :cache_size, cache_size // block_size :].sum(dim=-1, dtype=torch.float32)


def record_lengths(tokens: int, block_size: int) -> Tensor:
    """(tokens,) int64: how many trailing blocks of each token's record are worth storing.

    Token i matters at cache sizes n > i only; the first multiple of the block size above i is
    (i // block_size + 1) * block_size, so earlier blocks are never part of an importance.
    """
    blocks = -(-tokens // block_size)
    return blocks - 1 - torch.arange(tokens) // block_size


def record_entries(tokens: int, block_size: int) -> int:
    """How many numbers all tokens of a sequence store: the sum of :func:`record_lengths`."""
    blocks = -(-tokens // block_size)
    return block_size * blocks * (blocks - 1) // 2  # a last block that is not full stores nothing


def pack_record(record: Tensor, block_size: int) -> Tensor:
    """Keep the stored part of a record: (..., tokens, blocks) -> (..., entries), token-major."""
    return torch.cat([part.flatten(-2) for part in _stored(record, block_size)], dim=-1)


def unpack_record(packed: Tensor, tokens: int, block_size: int) -> Tensor:
    """Inverse of :func:`pack_record`; entries that were not stored are 0."""
    record = packed.new_zeros(*packed.shape[:-1], tokens, -(-tokens // block_size))
    start = 0
    for part in _stored(record, block_size):
        stop = start + part.shape[-2] * part.shape[-1]
        part.copy_(packed[..., start:stop].reshape(part.shape))
        start = stop
    return record


def _stored(record: Tensor, block_size: int) -> list[Tensor]:
    """Views (..., tokens of a block, later blocks) of what is stored: the tokens of a block store equally many."""
    blocks = record.shape[-1]
    return [record[..., block * block_size : (block + 1) * block_size, block + 1 :] for block in range(blocks)]
