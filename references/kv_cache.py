"""The cache as a list of slots: what one call of attention_with_kv_cache does, slot by slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.attention import Float64Array, attention
from references.rounding import BitsArray, Format, as_format, decode


class CacheOverflow(Exception):
    """A row would need more slots than the cache may ever have; nothing has been written.

    Attributes:
        row: the first row that does not fit.
    """

    def __init__(self, row: int, needed: int, cache_max_len: int) -> None:
        """Say which row, what it needed and what there is."""
        super().__init__(f"row {row} needs {needed} slots, cache_max_len is {cache_max_len}")
        self.row = row


@dataclass
class ReferenceCache:
    """Stored keys and values.

    Attributes:
        k_bits, v_bits: [batch, num_kv_heads, capacity, head_dim], raw bit patterns. Caches that continue from
            the same buffers share these arrays, as the caches they stand for share theirs.
        written: [batch, capacity], slots whose content is defined. Shared like the buffers.
        seq_lens: slots valid in each row.
    """

    k_bits: BitsArray
    v_bits: BitsArray
    written: NDArray[np.bool_]
    seq_lens: list[int]

    @property
    def capacity(self) -> int:
        """Slots allocated in each row."""
        return int(self.k_bits.shape[2])


@dataclass
class StepResult:
    """What a call returns.

    Attributes:
        out: [batch, num_q_heads, q_len, head_dim]; zeros in padding queries.
        lse: [batch, num_q_heads, q_len]; -inf in padding queries.
        cache: None if the call does not update the cache.
    """

    out: Float64Array
    lse: Float64Array
    cache: ReferenceCache | None


def empty_cache(batch: int, num_kv_heads: int, capacity: int, head_dim: int, fmt: Format | str) -> ReferenceCache:
    """A cache of ``capacity`` slots a row, none of them written."""
    dtype = np.dtype(f"uint{as_format(fmt).width}")
    shape = (batch, num_kv_heads, capacity, head_dim)
    written = np.zeros((batch, capacity), dtype=np.bool_)
    return ReferenceCache(np.zeros(shape, dtype), np.zeros(shape, dtype), written, [0] * batch)


def grown(cache: ReferenceCache, capacity: int) -> ReferenceCache:
    """A copy with more slots; the content of the old ones, written or not, is kept."""
    batch, num_kv_heads, old_capacity, head_dim = cache.k_bits.shape
    k_bits = np.zeros((batch, num_kv_heads, capacity, head_dim), cache.k_bits.dtype)
    v_bits = np.zeros_like(k_bits)
    written = np.zeros((batch, capacity), dtype=np.bool_)
    k_bits[:, :, :old_capacity] = cache.k_bits
    v_bits[:, :, :old_capacity] = cache.v_bits
    written[:, :old_capacity] = cache.written
    return ReferenceCache(k_bits, v_bits, written, list(cache.seq_lens))


def step(
    cache: ReferenceCache | None,
    q_bits: BitsArray,
    k_bits: BitsArray,
    v_bits: BitsArray,
    *,
    fmt: Format | str,
    seq_lens: list[int] | None,
    new_lens: list[int],
    cache_max_len: int,
    update_cache: bool,
    is_causal: bool,
    scale: float,
) -> StepResult:
    """Append the new tokens of every row and attend to everything the row then holds.

    Args:
        cache: None on a first call: buffers of ``cache_max_len`` slots are made.
        q_bits: [batch, num_q_heads, q_len, head_dim]
        k_bits: [batch, num_kv_heads, q_len, head_dim], the new keys.
        v_bits: like ``k_bits``.
        fmt: format of all bit patterns.
        seq_lens: slots valid before the call; None: what the cache says.
        new_lens: how many of the q_len new tokens are real in each row; the others are padding.
        cache_max_len: no row may hold more slots.
        update_cache: False: attend as if appended, store nothing, never overflow.
        is_causal: aligned bottom-right on the real tokens of a row.
        scale: multiplies the logits.

    Raises:
        CacheOverflow: before anything is written.
        ValueError: more slots are said to be valid than there are, or are written.
    """
    batch, num_q_heads, q_len, head_dim = q_bits.shape
    num_kv_heads = k_bits.shape[1]
    before = list(seq_lens) if seq_lens is not None else list(cache.seq_lens) if cache else [0] * batch
    capacity = cache.capacity if cache is not None else 0
    for b in range(batch):
        if not 0 <= before[b] <= capacity:
            raise ValueError(f"seq_lens[{b}] must be in [0, {capacity}], got {before[b]}")
        if not 0 <= new_lens[b] <= q_len:
            raise ValueError(f"new_lens[{b}] must be in [0, {q_len}], got {new_lens[b]}")
        if cache is not None and not cache.written[b, : before[b]].all():
            raise ValueError(f"seq_lens[{b}] must cover written slots only, got {before[b]}")

    if update_cache:
        for b in range(batch):
            if before[b] + new_lens[b] > cache_max_len:
                raise CacheOverflow(b, before[b] + new_lens[b], cache_max_len)

    out = np.zeros((batch, num_q_heads, q_len, head_dim))
    lse = np.full((batch, num_q_heads, q_len), -np.inf)
    for b in range(batch):
        new = new_lens[b]
        row_keys, row_values = k_bits[b, :, :new], v_bits[b, :, :new]
        if cache is not None:
            row_keys = np.concatenate([cache.k_bits[b, :, : before[b]], row_keys], axis=1)
            row_values = np.concatenate([cache.v_bits[b, :, : before[b]], row_values], axis=1)
        out[b, :, :new], lse[b, :, :new] = attention(
            decode(q_bits[b, :, :new], fmt),
            decode(row_keys, fmt),
            decode(row_values, fmt),
            is_causal=is_causal,
            scale=scale,
        )
    if not update_cache:
        return StepResult(out, lse, None)

    needed = max((before[b] + new_lens[b] for b in range(batch)), default=0)
    if cache is None:
        store = empty_cache(batch, num_kv_heads, cache_max_len, head_dim, fmt)
    elif needed > cache.capacity:
        store = grown(cache, min(max(needed, 2 * cache.capacity), cache_max_len))
    else:
        store = cache
    for b in range(batch):
        for i in range(new_lens[b]):
            slot = before[b] + i
            store.k_bits[b, :, slot] = k_bits[b, :, i]
            store.v_bits[b, :, slot] = v_bits[b, :, i]
            store.written[b, slot] = True
    after = [before[b] + new_lens[b] for b in range(batch)]
    return StepResult(out, lse, ReferenceCache(store.k_bits, store.v_bits, store.written, after))
