"""In which order a kernel visits the keys, and how many roundings and rescalings that makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# The splits in merge order; each the tiles it visits, in order, as key ranges [start, stop).
Tiles = tuple[tuple[tuple[int, int], ...], ...]


def _segment(start: int, stop: int, block_n: int) -> tuple[tuple[int, int], ...]:
    return tuple((a, min(a + block_n, stop)) for a in range(start, stop, block_n))


def tiling(cached: int, new: int, block_n: int, kv_split_size: int | None = None) -> Tiles:
    """The tiles of one row: first the cached slots, cut into splits, then the new tokens.

    Each of the two segments is cut in tiles from its own start, so the last cached tile and the last new one
    may be short. The last split also takes the new tokens.

    Args:
        cached: slots valid before the call, keys [0, cached).
        new: new tokens, keys [cached, cached + new).
        block_n: keys of a tile.
        kv_split_size: slots of a split, a multiple of block_n; None: no splitting.

    Example:
        >>> tiling(5, 3, 2, 4)
        (((0, 2), (2, 4)), ((4, 5), (5, 7), (7, 8)))
    """
    if block_n < 1:
        raise ValueError(f"block_n must be at least 1, got {block_n}")
    size = max(cached, 1) if kv_split_size is None else kv_split_size
    if size < 1 or (kv_split_size is not None and size % block_n != 0):
        raise ValueError(f"kv_split_size must be a positive multiple of block_n={block_n}, got {size}")
    splits = [_segment(a, min(a + size, cached), block_n) for a in range(0, cached, size)] or [()]
    splits[-1] += _segment(cached, cached + new, block_n)
    return tuple(splits)


@dataclass(frozen=True)
class Path:
    """How many inexact operations a key's contribution can pass through; [..., rows] unless said otherwise.

    Attributes:
        exps: [..., rows, kv_len or 1] exponentials multiplied into the weight of a key: its own, one for each
            later tile of its split that may raise the running maximum, and those of the merge.
        tile_keys: most visible keys in one tile.
        split_keys: most visible keys in one split.
        tiles: most tiles with a visible key in one split.
        steps: most fused steps in one split, and in one tile.
        rescales: most rescalings by a factor other than 1 in one split.
        splits: splits with a visible key.
        merge_rescales: rescalings in the merge.
    """

    exps: IntArray
    tile_keys: IntArray
    split_keys: IntArray
    tiles: IntArray
    split_steps: IntArray
    tile_steps: IntArray
    rescales: IntArray
    splits: IntArray
    merge_rescales: IntArray


def _records(upper: Float64Array, lower: Float64Array) -> IntArray:
    """1 where a maximum in [lower, upper] may exceed all earlier ones, along the last axis.

    The first finite one is not a record: what it rescales is zero.
    """
    before = np.full_like(lower, -np.inf)
    before[..., 1:] = np.maximum.accumulate(lower, axis=-1)[..., :-1]
    return ((upper > before) & (before > -np.inf)).astype(np.int64)


def _remaining(records: IntArray) -> IntArray:
    """How many records come after each position of the last axis."""
    remaining: IntArray = records.sum(axis=-1, keepdims=True) - np.cumsum(records, axis=-1)
    return remaining


def path(t: Float64Array, uncertainty: Float64Array, visible: BoolArray, tiles: Tiles, fused_products: int) -> Path:
    """Count along the way of the keys of every row.

    Args:
        t: [..., rows, kv_len] exact logits in base 2.
        uncertainty: like ``t``; a computed logit lies within it, apart from a factor common to the row.
        visible: [rows, kv_len]
        tiles: they must cover the keys in order.
        fused_products: products of one step of a tensor core.
    """
    flat = [tile for split in tiles for tile in split]
    starts = [start for start, _ in flat]
    if [0, *(stop for _, stop in flat)] != [*starts, t.shape[-1]] or any(a >= b for a, b in flat):
        raise ValueError(f"tiles must cover the keys [0, {t.shape[-1]}) in order, got {tiles}")
    widths = np.array([stop - start for start, stop in flat])
    keys = np.add.reduceat(visible.astype(np.int64), starts, axis=-1)  # [rows, tiles]
    steps = np.minimum(keys, -(-widths // fused_products))

    if len(flat) == 1:
        count, none = keys[..., 0], np.zeros(t.shape[:-1], dtype=np.int64)
        seen = (count > 0).astype(np.int64)
        own = np.ones((*t.shape[:-1], 1), dtype=np.int64)
        return Path(own, count, count, seen, steps[..., 0], steps[..., 0], none, seen, none)

    upper, lower = t + uncertainty, t - uncertainty
    if not visible.all():
        upper, lower = (np.where(visible, x, -np.inf) for x in (upper, lower))
    upper, lower = (np.maximum.reduceat(x, starts, axis=-1) for x in (upper, lower))
    ends = np.cumsum([len(split) for split in tiles])
    spans = [slice(end - len(split), end) for split, end in zip(tiles, ends, strict=True) if split]

    exps = np.ones(upper.shape, dtype=np.int64)
    rescales = np.zeros(upper.shape[:-1], dtype=np.int64)
    for span in spans:
        records = _records(upper[..., span], lower[..., span])
        exps[..., span] += _remaining(records)
        rescales = np.maximum(rescales, records.sum(axis=-1))

    def most(counts: IntArray, sums: bool = True) -> IntArray:
        """The largest count of a split, or of a tile."""
        totals = [counts[..., s].sum(axis=-1) if sums else counts[..., s].max(axis=-1) for s in spans]
        result: IntArray = np.max(totals, axis=0)
        return result

    live = np.stack([keys[..., s].sum(axis=-1) > 0 for s in spans], axis=-1)
    splits = live.sum(axis=-1)
    merge_rescales = np.zeros(upper.shape[:-1], dtype=np.int64)
    if len(spans) > 1:
        # Merged pairwise in order, a split is rescaled when it is taken in and whenever a later one raises
        # the maximum; merged at once, only the first.
        split_upper = np.stack([upper[..., s].max(axis=-1) for s in spans], axis=-1)
        split_lower = np.stack([lower[..., s].max(axis=-1) for s in spans], axis=-1)
        records = _records(split_upper, split_lower)
        merging = np.where(splits > 1, 1, 0)[..., None] * (1 + _remaining(records))
        for index, span in enumerate(spans):
            exps[..., span] += merging[..., index, None]
        merge_rescales = np.where(splits > 1, 1 + records.sum(axis=-1), 0)

    return Path(
        exps=np.repeat(exps, widths, axis=-1),
        tile_keys=most(keys, sums=False),
        split_keys=most(keys),
        tiles=most((keys > 0).astype(np.int64)),
        split_steps=most(steps),
        tile_steps=most(steps, sums=False),
        rescales=rescales,
        splits=splits,
        merge_rescales=merge_rescales,
    )
