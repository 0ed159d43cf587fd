"""Which kernel and which tiles a call uses, in plain Python.

The choice depends on the shape of one row's problem (queries, group, head_dim, dtype), never on the batch, on the
other rows' lengths or on the capacity of the cache: a row's bits must not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Path = Literal["split", "prefill"]

SHARED_MEMORY_BYTES = 99 * 1024
"""What every supported GPU (sm_80 and later) gives one block; sm_80 has 163 KiB, sm_90 and sm_100 227 KiB."""

SPLIT_ROWS = 64
"""Calls with at most this many (query, head) rows a kv head split the keys; longer ones have tiles enough."""

MAX_SPLITS = 128
"""A row's splits grow beyond ``kv_split_size`` slots rather than become more than this."""


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """How a call is launched. Tiles in rows (block_m) and keys (block_n); kv_split_size in slots."""

    path: Path
    block_m: int
    block_n: int
    block_d: int
    kv_split_size: int
    max_splits: int
    num_warps: int
    num_stages: int

    def split_size(self, cached: int) -> int | None:
        """Slots a split of a row with ``cached`` slots takes, or None on the prefill path.

        The same arithmetic as ``split_range`` in the kernel.
        """
        if self.path == "prefill":
            return None
        return max(self.kv_split_size, ceil_div(ceil_div(cached, self.max_splits), self.block_n) * self.block_n)

    def num_splits(self, cached: int) -> int:
        """Splits of a row with ``cached`` slots; never fewer for a longer row."""
        size = self.split_size(cached)
        return 1 if size is None else max(1, ceil_div(cached, size))


@dataclasses.dataclass(frozen=True)
class _Forced:
    path: Path | None = None
    block_m: int | None = None
    block_n: int | None = None
    kv_split_size: int | None = None


_forced = _Forced()


@contextmanager
def forced(
    *,
    path: Path | None = None,
    block_m: int | None = None,
    block_n: int | None = None,
    kv_split_size: int | None = None,
) -> Iterator[None]:
    """Force parts of the plan of every call made inside; for tests, which must reach every kernel and split count.

    Raises:
        ValueError: kv_split_size is not a positive multiple of 16.
    """
    global _forced
    if kv_split_size is not None and (kv_split_size < 16 or kv_split_size % 16):
        raise ValueError(f"kv_split_size must be a positive multiple of 16, got {kv_split_size}")
    before = _forced
    _forced = _Forced(path, block_m, block_n, kv_split_size)
    try:
        yield
    finally:
        _forced = before


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def shared_memory_bytes(path: Path, block_m: int, block_n: int, block_d: int, itemsize: int, num_stages: int) -> int:
    """Upper estimate of a kernel's shared memory: K and V tiles of every stage, Q and P once."""
    kv = 2 * block_n * block_d * itemsize * max(num_stages - (path == "split"), 1)
    return kv + block_m * (block_d + block_n) * itemsize


def plan(
    *,
    q_len: int,
    group_size: int,
    head_dim: int,
    dtype: torch.dtype,
    block_m: int | None = None,
    block_n: int | None = None,
) -> LaunchPlan:
    """The plan of a call with ``q_len`` queries and ``group_size`` query heads a kv head.

    Args:
        q_len: queries a row, padding included.
        group_size: query heads a kv head.
        head_dim: elements, 1..256.
        dtype: of the inputs.
        block_m: forces the tile of (query, head) rows.
        block_n: forces the tile of keys.
    """
    rows = q_len * group_size
    itemsize = dtype.itemsize
    block_d = max(16, next_power_of_2(head_dim))
    path: Path = _forced.path or ("split" if rows <= SPLIT_ROWS else "prefill")
    block_m = block_m or _forced.block_m
    block_n = block_n or _forced.block_n
    wide = block_d * itemsize >= 512  # 256 halves or 128 floats a row
    if block_m is None:
        block_m = min(max(16, next_power_of_2(max(rows, 1))), 64 if path == "split" or itemsize == 4 else 128)
        if block_d * itemsize >= 1024:
            block_m = min(block_m, 32)
        elif wide:
            block_m = min(block_m, 64)
    if block_n is None:
        block_n = 16 if block_d * itemsize >= 1024 else 32 if wide or itemsize == 4 else 64
    kv_split_size = _forced.kv_split_size or max(256, block_n)
    kv_split_size = ceil_div(kv_split_size, block_n) * block_n
    num_warps = 4 if block_m <= 64 else 8
    num_stages = 3 if path == "split" else 2
    while num_stages > 1 and (
        shared_memory_bytes(path, block_m, block_n, block_d, itemsize, num_stages) > SHARED_MEMORY_BYTES
    ):
        num_stages -= 1
    max_splits = MAX_SPLITS if _forced.kv_split_size is None else 1 << 30
    return LaunchPlan(path, block_m, block_n, block_d, kv_split_size, max_splits, num_warps, num_stages)
