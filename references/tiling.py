"""In which order a kernel visits the keys, and how many roundings and rescalings that makes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
# Of every row, or one number for all of them.
Count = IntArray | int

# What ``merge="grouped"`` in an arithmetic model stands for.
MERGE_GROUP = 4

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


@dataclass(frozen=True, eq=False)
class Layout:
    """Tiles as arrays, in the order of their keys; splits without a tile are left out.

    Attributes:
        starts: [tiles] first key of each.
        widths: [tiles] keys of each.
        place, split: [tiles] the place of each in its split, in the order visited, and the split.
        shape: most tiles of a split, and splits.
        kv_len: keys of all tiles.
        is_one_run: whether there is one split, which visits its keys in their order.
    """

    starts: IntArray
    widths: IntArray
    place: IntArray
    split: IntArray
    shape: tuple[int, int]
    kv_len: int
    is_one_run: bool

    @cached_property
    def all_keys(self) -> IntArray:
        """[tiles of a split, splits, 1], the keys of each tile."""
        keys = np.zeros((*self.shape, 1), dtype=np.int64)
        keys[self.place, self.split, 0] = self.widths
        return keys


@lru_cache(maxsize=1024)
def layout(tiles: Tiles, kv_len: int) -> Layout:
    """The arrays of a tiling.

    Raises:
        ValueError: the tiles do not cover each of the keys [0, kv_len) once.
    """
    splits = [split for split in tiles if split]
    visited = [(*tile, i, split) for split, its in enumerate(splits) for i, tile in enumerate(its)]
    starts, stops, place, split = np.array(sorted(visited)).T
    if [0, *stops] != [*starts, kv_len] or (starts >= stops).any():
        raise ValueError(f"tiles must cover each of the keys [0, {kv_len}) once, got {tiles}")
    shape = (max(map(len, splits)), len(splits))
    is_one_run = len(splits) == 1 and sorted(visited) == visited
    return Layout(starts, stops - starts, place, split, shape, kv_len, is_one_run)


@dataclass(frozen=True)
class Counts:
    """How many keys, tiles and splits a row sees: [rows], or one number for all rows.

    Attributes:
        keys: visible keys.
        tile_keys: most visible keys in one tile.
        split_keys: most visible keys in one split.
        tiles: most tiles with a visible key in one split.
        splits: splits with a visible key.
        sum_additions: most additions that a weight passes in the row sum of its split.
        merge_additions: additions of splits.
        split_steps, tile_steps: most fused steps in one split, and in one tile.
    """

    keys: Count
    tile_keys: Count
    split_keys: Count
    tiles: Count
    splits: Count
    sum_additions: Count
    merge_additions: Count
    split_steps: Count
    tile_steps: Count


def counts(visible: list[BoolArray], tiles: list[Layout], fused_products: int) -> Counts:
    """Count for the rows of all sequences, one after the other; ``visible`` is [rows, kv_len] of each."""
    everything = [bool(np.logical_and.reduce(sees, axis=None)) for sees in visible]
    if len(tiles) == 1 and everything[0]:
        return _counts_of_all(tiles[0], fused_products)
    ends = list(itertools.accumulate(len(sees) for sees in visible))
    keys = np.zeros((*_most_places(tiles), ends[-1]), dtype=np.int64)
    steps = np.zeros_like(keys) if fused_products > 1 else keys
    for start, end, sees, sees_all, order in zip([0, *ends], ends, visible, everything, tiles, strict=False):
        mine = keys[: order.shape[0], : order.shape[1], start:end]
        if sees_all:
            mine[...] = order.all_keys
        else:
            _put(np.add.reduceat(sees.view(np.uint8), order.starts, axis=-1, dtype=np.int64).T, mine, order)
        if fused_products > 1:
            most_steps = -(-order.all_keys // fused_products)
            np.minimum(mine, most_steps, out=steps[: order.shape[0], : order.shape[1], start:end])
    return Counts(*_counts(keys, steps))


@lru_cache(maxsize=1024)
def _counts_of_all(tiles: Layout, fused_products: int) -> Counts:
    """The counts where every row sees every key."""
    keys = tiles.all_keys
    return Counts(*(int(count[0]) for count in _counts(keys, -(-keys // fused_products))))


def _counts(keys: IntArray, steps: IntArray) -> list[IntArray]:
    """The numbers of ``Counts`` from what a row sees of every tile, [tiles of a split, splits, rows]."""
    add, maximum = np.add.reduce, np.maximum.reduce
    in_split, sees = add(keys, axis=0), keys > 0
    if keys.shape[1] == 1:
        of_row = split_keys = in_split[0]
        most_tiles, splits = add(sees[:, 0], axis=0), np.minimum(of_row, 1)
        tile_keys = maximum(keys[:, 0], axis=0)
    else:
        of_row, split_keys = add(in_split, axis=0), maximum(in_split, axis=0)
        most_tiles, splits = maximum(add(sees, axis=0), axis=0), add(in_split > 0, axis=0)
        tile_keys = maximum(keys, axis=(0, 1))
    return [
        of_row,
        tile_keys,
        split_keys,
        most_tiles,
        splits,
        np.minimum(tile_keys + most_tiles - 2, split_keys - 1),
        np.maximum(splits - 1, 0),
        split_keys if steps is keys else maximum(add(steps, axis=0), axis=0),
        tile_keys if steps is keys else maximum(steps, axis=(0, 1)),
    ]


def _most_places(tiles: list[Layout]) -> tuple[int, int]:
    """Most tiles of a split, and most splits."""
    return max(order.shape[0] for order in tiles), max(order.shape[1] for order in tiles)


def _put(of_tiles: NDArray[Any], places: NDArray[Any], order: Layout) -> None:
    """Put [tiles, ...] in their places [tiles of a split, splits, ...]."""
    if order.is_one_run:
        places[: order.shape[0], 0] = of_tiles
    else:
        places[order.place, order.split] = of_tiles


@dataclass(frozen=True)
class Path:
    """How many inexact operations the contribution of a key can pass through, as far as the data decide it.

    Attributes:
        exps: [tiles of a split, splits, heads, rows] exponentials multiplied into the weight of a key of a tile: its
            own, one for each later tile of its split that may raise the running maximum, and those of the merge.
        rescales: [..., rows] most rescalings by a factor other than 1 in one split.
        merge_rescales: [..., rows] rescalings in the merge.
    """

    exps: Count
    rescales: Count
    merge_rescales: Count


def _records(upper: Float64Array, lower: Float64Array) -> IntArray:
    """How many maxima in [lower, upper], up to each, may exceed all earlier ones, along the first axis.

    The first finite one is not a record: what it rescales is zero.
    """
    before = np.maximum.accumulate(lower[:-1], axis=0)
    found = np.zeros(lower.shape, np.bool_)
    np.greater(upper[1:], before, out=found[1:])
    found[1:] &= before > -np.inf
    records: IntArray = np.add.accumulate(found, axis=0, dtype=np.int64)
    return records


def highest(several: list[Float64Array], rows: list[slice], tiles: list[Layout]) -> Float64Array:
    """Largest of the numbers [heads, rows, kv_len] in each tile; -inf where there is none.

    Returns:
        [tiles of a split, splits, arrays, heads, rows]
    """
    of_tiles = np.full((*_most_places(tiles), len(several), *several[0].shape[:-1]), -np.inf)
    for mine, order in zip(rows, tiles, strict=True):
        places = of_tiles[..., mine]
        for i, of_keys in enumerate(several):
            maxima = np.maximum.reduceat(of_keys[:, mine, : order.kv_len], order.starts, axis=-1)
            _put(maxima.transpose(2, 0, 1), places[:, :, i], order)
    return of_tiles


def path(upper: Float64Array, lower: Float64Array, splits: Count, *, merge: str = "max") -> Path:
    """Count along the way of the keys of every row.

    Args:
        upper, lower: [tiles of a split, splits, heads, rows] bounds of the largest computed logit in base 2 of each
            tile, apart from a factor common to the row; -inf where all its keys are hidden.
        splits: with a visible key, see ``Counts``.
        merge: as in ``ArithmeticModel``: "grouped" is in groups of ``MERGE_GROUP``, then the groups; of "lse twice" the
            groups are not known, so that each other split, or the group that it is in, may raise the maximum once.
    """
    records = _records(upper, lower)
    exps = (1 + records[-1]) - records
    rescales = records[-1, 0] if len(records[-1]) == 1 else np.maximum.reduce(records[-1], axis=0)
    merge_rescales: Count = 0
    num_splits = upper.shape[1]
    if num_splits > 1:
        upper, lower = upper.max(axis=0), lower.max(axis=0)  # [splits, heads, rows]
        if merge == "lse twice":
            merge_rescales = np.where(np.asarray(splits) > 1, 1 + np.asarray(splits), 0)
            exps += merge_rescales
        elif merge == "grouped" and num_splits > MERGE_GROUP:
            # [splits of a group, groups, heads, rows]
            upper, lower = (_in_groups(of_splits) for of_splits in (upper, lower))
            merge_exps, merge_rescales = _merging(upper, lower, (upper > -np.inf).sum(axis=0))
            upper, lower = upper.max(axis=0), lower.max(axis=0)
            more_exps, more_rescales = _merging(upper, lower, (upper > -np.inf).sum(axis=0))
            exps += (merge_exps + more_exps).swapaxes(0, 1).reshape(-1, *upper.shape[1:])[:num_splits]
            merge_rescales = merge_rescales.max(axis=0) + more_rescales
        else:
            merge_exps, merge_rescales = _merging(upper, lower, splits)
            exps += merge_exps
    return Path(exps, rescales, merge_rescales)


def _merging(upper: Float64Array, lower: Float64Array, splits: Count) -> tuple[IntArray, IntArray]:
    """Exponentials that each of the states along the first axis meets when they are merged, and most rescalings.

    Merged pairwise in order, a state is rescaled when it is taken in and whenever a later one raises the maximum;
    merged at once, only the first. ``splits``: how many see a key; a single one is not rescaled.
    """
    records = _records(upper, lower)
    several = np.asarray(splits) > 1
    return several * (1 + records[-1] - records), several * (1 + records[-1])


def _in_groups(of_splits: Float64Array) -> Float64Array:
    """[splits, ...] as [splits of a group, groups, ...]; places without a split hold -inf."""
    missing = -len(of_splits) % MERGE_GROUP
    places = np.pad(of_splits, [(0, missing), *[(0, 0)] * (of_splits.ndim - 1)], constant_values=-np.inf)
    return places.reshape(-1, MERGE_GROUP, *of_splits.shape[1:]).swapaxes(0, 1)


def add_to_keys(of_all: Float64Array, of_tiles: Float64Array, rows: list[slice], tiles: list[Layout]) -> None:
    """Add [tiles of a split, splits, heads, rows] to [heads, rows, kv_len]."""
    for mine, order in zip(rows, tiles, strict=True):
        places = of_tiles[..., mine]
        in_order = places[: order.shape[0], 0] if order.is_one_run else places[order.place, order.split]
        of_all[:, mine, : order.kv_len] += np.repeat(in_order.transpose(1, 2, 0), order.widths, axis=-1)


ONE_TILE = Path(exps=1, rescales=0, merge_rescales=0)
