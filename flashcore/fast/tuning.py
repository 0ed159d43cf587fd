"""Which kernel and which tiles a call uses, in plain Python.

The choice depends on the shape of one row's problem (queries, group, head_dim, dtype), never on the batch, on the
other rows' lengths or on the capacity of the cache: a row's bits must not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import triton

Path = Literal["split", "split_sm90", "prefill", "prefill_sm90"]

SPLIT_PATHS = ("split", "split_sm90")
"""Those that split the keys of a row."""

SPLIT_ROWS = 32
"""Calls with at most this many (query, head) rows a kv head split the keys; longer ones have tiles enough."""

WIDE_SPLIT_ROWS = 16
"""The same for wide tiles (float32, head_dim beyond 128), whose split kernel would spill with more rows."""

KV_SPLIT_BYTES = 32 * 1024
"""Keys and values of a short row's splits in a decode step: beyond that, one more split costs less than it saves."""

FEW_SPLITS = 8
"""So many splits of a decode step become longer before there are more of them ..."""

LONG_SPLIT, LONGEST_SPLIT = 8, 32
"""... namely so many times as long until there are twice as many, and then so many times."""

CHUNK_SPLIT_BYTES = 128 * 1024
"""Keys and values of a split where several queries are new, and a program never takes several splits."""


class Sm90Tiles(NamedTuple):
    """What goes with a tile of rows of the prefill kernel for Hopper.

    Attributes:
        block_n: tile of keys.
        num_stages: tiles on their way.
        registers: of a thread when a program starts.
        query_in_registers: whether the products with keys take the queries from there, not from shared memory.
    """

    block_n: int
    num_stages: int
    registers: int
    query_in_registers: bool


SM90_TILES = {
    64: {64: Sm90Tiles(64, 3, 80, False), 128: Sm90Tiles(128, 2, 168, False)},
    128: {64: Sm90Tiles(64, 2, 128, True), 128: Sm90Tiles(128, 2, 168, False)},
}
"""By head_dim, of those that the prefill kernel for Hopper takes in 16-bit formats, and by rows: 64 a warpgroup."""

SM90_LONG_PROMPT = {64: 8192, 128: 4096}
"""By head_dim, the queries from which on tiles have 128 rows.

Of fewer, whose programs see fewer keys, several programs on a multiprocessor hide how each begins and ends.
"""

SM90_SPLIT_BYTES = 64 * 1024
"""KV_SPLIT_BYTES of the decode kernel for Hopper ..."""

SM90_LONG_SPLIT, SM90_LONGEST_SPLIT = 4, 16
"""... and LONG_SPLIT and LONGEST_SPLIT: at the same bytes."""

SM90_LEAST_HEADS, SM90_HEADS = 8, 16
"""Columns of the products in the decode kernel for Hopper, which has the head_dims of SM90_TILES: heads a kv head."""

SM90_DECODE_KEYS = {64: 128, 128: 64}
"""Keys of a tile in that kernel, by head_dim."""

MOST_PROGRAMS = 65535
"""In the second and third dimension of a grid."""

SM90_STAGES = 3
"""Places for tiles in a program of that kernel: two programs fit on a multiprocessor."""

SM90_PROGRAM_GB_S = 49.0
"""PROGRAM_GB_S of that kernel, of either head_dim, ..."""

SM90_SPLITS_COST_US = 1.0
"""... and SPLITS_COST_US."""

SM90_MEMORY_GB_S = 3350.0
"""The memory's nominal rate where the driver does not tell: an H100's."""

MAX_SPLITS = 64
"""A row's splits grow rather than become more than this."""

SPLIT_GROUP = 4
"""Splits are merged in groups of so many, and then the groups: so that one program can take a group.

``merge_stored`` names four, and the error bound counts ``references.tiling.MERGE_GROUP``.
"""


LEAST_MERGED_ROWS = 4
"""Rows of the smallest tile that merges stored splits: each size is a kernel of its own."""

PROGRAM_GB_S = (25.0, 29.0)
"""What one program of a decode step reads at most, alone on a multiprocessor: up to head_dim 64, and beyond it.

Measured on an H200, as the next three are; UNEVEN_PROGRAMS is what was fastest there (docs/performance.md,
versions 7 and 9).
"""

MEMORY_SHARE = 0.85
"""Of the memory's nominal rate, what all programs together read."""

GROUPS_COST_US = 1.5
"""What it costs to store groups of splits and merge them, instead of whole rows."""

SPLITS_COST_US, CROWDED_SPLITS_COST_US = 5.0, 1.1
"""What it costs to store single splits and merge them, instead of groups; and where more programs run at a time."""

CROWDED_REGISTERS, CROWDED_STAGES = 128, 2
"""Of a program of a decode step that has a multiprocessor with others: then four fit there and not two."""

CROWDED_MERGE = 1024
"""Elements of the largest tile that merges stored splits with so few registers."""

ROOMY_PROGRAMS = 2
"""Programs of a decode step that fit on a multiprocessor with as many registers as they like."""

UNEVEN_PROGRAMS = 4
"""Splits or groups of rows that differ in length, for each multiprocessor, as if all were as long as the longest."""


class Gpu(NamedTuple):
    """What sharing out the work depends on: the nominal rate of the memory is 0 where it is not known."""

    multiprocessors: int
    memory_gb_s: float


class Shares(NamedTuple):
    """How the splits of a call are shared out among programs.

    Attributes:
        splits_per_program: 1, SPLIT_GROUP, or as many as any row has.
        is_crowded: whether the programs, of one split each, have few registers so that more share a multiprocessor.
    """

    splits_per_program: int
    is_crowded: bool


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """How a call is launched.

    Attributes:
        path: which kernel.
        block_m: tile of (query, head) rows.
        merge_m: tile of rows that merges stored splits.
        block_n: tile of keys.
        block_new: tile of new tokens on the split path, which holds all of them; block_n on the other.
        block_d: columns of a tile, head_dim and padding.
        one_query: whether q_len is 1 (split paths): portably, the new token is taken without a product of tiles.
        unsplit_size: slots of the longest row that is not split.
        kv_split_size: slots of a split until there are few_splits of them; a multiple of block_n.
        few_splits: from here on splits become longer before there are more.
        max_splits: a row's splits grow rather than become more than this.
        num_warps: of a program.
        num_stages: of the software pipeline, or places for tiles in a ring.
        arch: compute capability of the GPU times 10.
        slot_bytes: of keys and values of one slot, as the kernel reads them.
    """

    path: Path
    block_m: int
    merge_m: int
    block_n: int
    block_new: int
    block_d: int
    one_query: bool
    unsplit_size: int
    kv_split_size: int
    few_splits: int
    max_splits: int
    num_warps: int
    num_stages: int
    arch: int
    slot_bytes: int

    def compiler_options(self, *, several: bool = False, crowded: bool = False) -> dict[str, int | bool]:
        """What the kernels are compiled with.

        Args:
            several: for the kernel in which a program takes several splits.
            crowded: for programs of which there are many, see ``Shares``.

        No contraction of a * b + c: the difference of two rounded logits is never positive, so that no weight passes 1.
        Contracted, the larger of two huge logits could exceed its own rounded maximum, and its weight overflow; and
        tiles with a mask and without would differ in their last bits.
        """
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        options["enable_fp_fusion"] = False
        if self.path == "prefill_sm90":
            options["maxnreg"] = SM90_TILES[self.block_d][self.block_m].registers
        # Without a number the assembler spills a few, for an occupancy of no use here; in these with one.
        spills_with_one = (
            self.one_query and self.num_warps == 4 and (self.arch == 90 if several else self.block_d == 64)
        )
        if self.path == "split_sm90" or (self.path == "split" and not spills_with_one):
            options["maxnreg"] = 255
        if crowded:
            options |= {"maxnreg": CROWDED_REGISTERS, "num_stages": CROWDED_STAGES}
        return options

    def grid_splits(self, cached: int) -> int:
        """Splits that a row with up to ``cached`` slots may have; never fewer for a longer row."""
        if self.path not in SPLIT_PATHS or cached <= self.unsplit_size:
            return 1
        size = self.kv_split_size
        long, longest = self.long_splits
        wanted = max(
            min(ceil_div(cached, size), self.few_splits),
            min(ceil_div(cached, long * size), 2 * self.few_splits),
            ceil_div(cached, longest * size),
        )
        return max(min(wanted, self.max_splits), 1)

    @property
    def long_splits(self) -> tuple[int, int]:
        """How many times as long as the shortest splits are until there are twice few_splits, and then."""
        return (SM90_LONG_SPLIT, SM90_LONGEST_SPLIT) if self.path == "split_sm90" else (LONG_SPLIT, LONGEST_SPLIT)

    def share_out(self, rows: int, longest: int, bound: int, *, is_even: bool, gpu: Gpu) -> Shares:
        """How the splits are shared out among programs. No bit depends on it: it may follow from the whole batch.

        A program that has its whole row merges nothing through memory, one that has a group of splits stores one
        state for all of them; but the GPU must be filled, and where rows differ a long one must not come last. Then,
        or where that costs more than it saves, each split has a program; if these are many, more of them at a time
        hide how each begins and ends.

        Args:
            rows: tiles of rows, of all batch rows and kv heads.
            longest: cached slots of the longest row, as far as the host can tell.
            bound: cached slots that no row exceeds.
            is_even: whether all rows are about as long, as far as the host can tell.
            gpu: it runs on.
        """
        if self.one_query and _forced.splits_per_program:
            return Shares(min(_forced.splits_per_program, self.grid_splits(bound)), False)
        crowd = self._is_crowd(rows, longest, bound, is_even, gpu)
        splits = self._splits_per_program(rows, longest, bound, is_even, crowd, gpu)
        return Shares(splits, crowd and splits == 1)

    def _splits_per_program(self, rows: int, longest: int, bound: int, is_even: bool, crowd: bool, gpu: Gpu) -> int:
        """1, SPLIT_GROUP, or as many as any row has; ``crowd`` says whether programs of one split would be crowded."""
        if not self.one_query or (crowd and not is_even):
            return 1
        most = self.grid_splits(bound)
        if self.path == "split_sm90":
            return self._splits_per_program_sm90(rows, longest, most, is_even, gpu)
        enough = gpu.multiprocessors * 2 // 3
        is_short = longest <= self.few_splits * self.kv_split_size
        if rows >= enough and (is_even or is_short) and self._waits_us(rows, longest, gpu) <= GROUPS_COST_US:
            return most
        groups = ceil_div(self.grid_splits(longest), SPLIT_GROUP)
        # Of rows that differ most have fewer groups than the longest.
        if rows * groups < (enough if is_even else UNEVEN_PROGRAMS * gpu.multiprocessors):
            return 1
        cost = CROWDED_SPLITS_COST_US if crowd else SPLITS_COST_US
        return min(SPLIT_GROUP, most) if self._waits_us(rows * groups, longest / groups, gpu) <= cost else 1

    def _splits_per_program_sm90(self, rows: int, longest: int, most: int, is_even: bool, gpu: Gpu) -> int:
        """As ``_splits_per_program``: merging through memory costs as much, and programs read faster."""
        gpu = gpu._replace(memory_gb_s=gpu.memory_gb_s or SM90_MEMORY_GB_S)
        if is_even and self._waits_us(rows, longest, gpu) <= GROUPS_COST_US:
            return most
        groups = ceil_div(self.grid_splits(longest), SPLIT_GROUP)
        if not is_even and rows * groups < UNEVEN_PROGRAMS * gpu.multiprocessors:
            return 1
        waits = self._waits_us(rows * groups, longest / groups, gpu)
        return min(SPLIT_GROUP, most) if waits <= SM90_SPLITS_COST_US else 1

    def _is_crowd(self, rows: int, longest: int, bound: int, is_even: bool, gpu: Gpu) -> bool:
        """Whether programs of one split are more than fit on the GPU with as many registers as they like."""
        if self.path != "split" or not self.one_query or self.block_d < 64 or self.num_warps != 4:
            return False
        if not has_crowded_decode(self.arch):
            return False
        if self.grid_splits(bound) == 1:
            return rows > gpu.multiprocessors or _forced.crowded
        if self.merge_m * self.block_d > CROWDED_MERGE:
            return False
        room = (ROOMY_PROGRAMS if is_even else UNEVEN_PROGRAMS) * gpu.multiprocessors
        return rows * self.grid_splits(longest) > room or _forced.crowded

    def _waits_us(self, programs: int, slots: float, gpu: Gpu) -> float:
        """What programs of so many slots take longer than the memory needs, each alone on a multiprocessor."""
        if programs > gpu.multiprocessors or not gpu.memory_gb_s:
            return 0.0
        alone = PROGRAM_GB_S[0 if self.block_d <= 64 else 1] if self.path == "split" else SM90_PROGRAM_GB_S
        num_bytes = slots * self.slot_bytes
        return num_bytes * (1 / alone - programs / (MEMORY_SHARE * gpu.memory_gb_s)) / 1e3

    def grid(self, row_programs: int, num_kv_heads: int, batch: int, row_tiles: int) -> tuple[int, int, int]:
        """Programs of a launch that splits keys: so many for each row, in the first dimension."""
        if self.path == "split_sm90" and max(num_kv_heads, batch) <= MOST_PROGRAMS:
            return row_programs, num_kv_heads, batch
        return row_programs * num_kv_heads * batch, row_tiles, 1

    def kernel_kind(self, grid_splits: int, shares: Shares) -> tuple[bool, bool, bool]:
        """Which of a path's kernels runs: whether programs take several splits, are crowded, and have unsplit rows."""
        if self.path == "split_sm90":
            return False, False, False
        return shares.splits_per_program > 1, shares.is_crowded, shares.is_crowded and grid_splits == 1

    def likely_split_size(self, longest: int | None, bound: int, *, is_even: bool, shortest: int = 0) -> int:
        """Slots of each split of most rows, or 0 if the host cannot tell: for prefetches, on which no result depends.

        For the kernel for Hopper, which asks for its length first where it may well have nothing to do, -1 says that
        rows differ.

        Args:
            longest, bound, is_even: as in ``share_out``; longest may be unknown.
            shortest: cached slots that every row has.
        """
        if longest is None or not is_even:
            return -1 if self.path == "split_sm90" and not is_even else 0
        if self.grid_splits(longest) != self.grid_splits(bound):
            return 0
        if self.path == "split_sm90" and not self.are_alike(shortest, longest):
            return 0
        return self.split_size(longest) or 0

    def are_alike(self, shortest: int, longest: int) -> bool:
        """Whether rows between these lengths have splits of one size: the kernel for Hopper has to undo its guesses."""
        return ceil_div(shortest, self.kv_split_size) == ceil_div(longest, self.kv_split_size)

    def split_size(self, cached: int) -> int | None:
        """Slots a split of a row with ``cached`` slots takes, or None where there are no splits.

        The same arithmetic as ``row_splits`` in the kernel.
        """
        if self.path not in SPLIT_PATHS:
            return None
        return max(ceil_div(ceil_div(cached, self.grid_splits(cached)), self.block_n), 1) * self.block_n

    def num_splits(self, cached: int) -> int:
        """Splits of a row with ``cached`` slots: not more than ``grid_splits``, fewer where whole tiles make it so."""
        size = self.split_size(cached)
        return 1 if size is None else max(1, ceil_div(cached, size))


@dataclasses.dataclass(frozen=True)
class _Forced:
    path: Path | None = None
    block_m: int | None = None
    block_n: int | None = None
    kv_split_size: int | None = None
    max_splits: int | None = None
    few_splits: int | None = None
    crowded: bool = False
    splits_per_program: int | None = None


_forced = _Forced()
_generation = 0


def generation() -> int:
    """Changes whenever ``forced`` begins or ends: a plan made under another generation may not be reused."""
    return _generation


@contextmanager
def forced(
    *,
    path: Path | None = None,
    block_m: int | None = None,
    block_n: int | None = None,
    kv_split_size: int | None = None,
    max_splits: int | None = None,
    few_splits: int | None = None,
    crowded: bool = False,
    splits_per_program: int | None = None,
) -> Iterator[None]:
    """Force parts of the plan of every call made inside; for tests, which must reach every kernel and split count.

    A forced ``kv_split_size`` holds for rows of any length unless ``max_splits`` or ``few_splits`` is forced, too.
    ``crowded``: few programs of one split are a crowd, see ``Shares``. ``splits_per_program``: of decode steps, 1,
    SPLIT_GROUP, or more than any row has.

    Raises:
        ValueError: kv_split_size is not a positive multiple of 16, or max_splits not positive.
    """
    global _forced, _generation
    if kv_split_size is not None and (kv_split_size < 16 or kv_split_size % 16):
        raise ValueError(f"kv_split_size must be a positive multiple of 16, got {kv_split_size}")
    if max_splits is not None and max_splits < 1:
        raise ValueError(f"max_splits must be at least 1, got {max_splits}")
    before = _forced
    _forced = _Forced(path, block_m, block_n, kv_split_size, max_splits, few_splits, crowded, splits_per_program)
    _generation += 1
    try:
        yield
    finally:
        _forced = before
        _generation += 1


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two, at least what a tensor core takes."""
    return max(16, next_power_of_2(head_dim))


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability of a GPU times 10; 80 for the CPU, where tiles are Ampere's."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """A GPU; for the CPU one of few multiprocessors, so that small batches differ in how they are shared out, too."""
    if device.type != "cuda":
        return Gpu(9, 0.0)
    properties = torch.cuda.get_device_properties(device)
    # Kilohertz, two transfers a clock, and bits.
    rate = getattr(properties, "memory_clock_rate", 0) * 2 * getattr(properties, "memory_bus_width", 0) / 8e6
    return Gpu(properties.multi_processor_count, rate)


@functools.cache
def has_crowded_decode(arch: int) -> bool:
    """Whether CROWDED_REGISTERS are enough: for Hopper and later the assembler of other Tritons than 3.6 spills."""
    return arch < 90 or triton.__version__.startswith("3.6.")


@functools.cache
def has_sm90_kernels(arch: int) -> bool:
    """Whether calls can have the kernels for Hopper: they are written in Gluon, which changes with each Triton."""
    return arch == 90 and triton.__version__.startswith("3.6.")


def plan(
    *,
    q_len: int,
    group_size: int,
    head_dim: int,
    dtype: torch.dtype,
    block_m: int | None = None,
    block_n: int | None = None,
    arch: int = 80,
) -> LaunchPlan:
    """The plan of a call with ``q_len`` queries and ``group_size`` query heads a kv head.

    Args:
        q_len: queries a row, padding included.
        group_size: query heads a kv head.
        head_dim: elements, 1..256.
        dtype: of the inputs.
        block_m: forces the tile of (query, head) rows.
        block_n: forces the tile of keys.
        arch: compute capability of the GPU times 10; it decides the tile of rows and the pipeline, which no error
            bound sees.
    """
    rows = q_len * group_size
    block_d = padded_head_dim(head_dim)
    is_float32 = dtype == torch.float32
    # The split kernel holds all new tokens in one tile.
    split_rows = _split_rows(is_float32, block_d)
    may_split = q_len <= split_rows and _forced.path in (None, *SPLIT_PATHS)
    path: Path = "split" if may_split and (rows <= split_rows or _forced.path == "split") else "prefill"
    on_hopper = not is_float32 and head_dim in SM90_TILES and has_sm90_kernels(arch)
    has_tiles = bool(block_m or block_n or _forced.block_m or _forced.block_n)
    is_decode = path == "split" and q_len == 1 and rows <= SM90_HEADS
    if on_hopper and is_decode and (_forced.path == "split_sm90" or not (_forced.path or has_tiles)):
        path = "split_sm90"
        block_m, block_n = max(SM90_LEAST_HEADS, next_power_of_2(rows)), SM90_DECODE_KEYS[head_dim]
    if path == "prefill" and on_hopper:
        is_forced = _forced.path == "prefill_sm90"
        if is_forced or not (_forced.path or has_tiles):
            path = "prefill_sm90"
            block_m = (_forced.block_m if is_forced else None) or (128 if q_len >= SM90_LONG_PROMPT[head_dim] else 64)
            block_n = SM90_TILES[head_dim][block_m].block_n
    block_m = block_m or _forced.block_m or _default_block_m(rows, is_float32, block_d, arch)
    block_n = block_n or _forced.block_n or _default_block_n(path, q_len == 1 and block_m == 16, is_float32, block_d)
    one_query = path in SPLIT_PATHS and q_len == 1
    of_decode = SM90_SPLIT_BYTES if path == "split_sm90" else KV_SPLIT_BYTES
    fits = (of_decode if one_query else CHUNK_SPLIT_BYTES) // (2 * block_d * (4 if is_float32 else 2))
    kv_split_size = ceil_div(_forced.kv_split_size or fits, block_n) * block_n
    max_splits = _forced.max_splits or (MAX_SPLITS if _forced.kv_split_size is None else 1 << 30)
    few_splits = FEW_SPLITS if one_query and _forced.kv_split_size is None else max_splits
    return LaunchPlan(
        path=path,
        block_m=block_m,
        merge_m=min(block_m, max(LEAST_MERGED_ROWS, next_power_of_2(rows))) if one_query else block_m,
        block_n=block_n,
        block_new=max(16, next_power_of_2(max(q_len, 1))) if path in SPLIT_PATHS else block_n,
        block_d=block_d,
        one_query=one_query,
        unsplit_size=kv_split_size if _forced.kv_split_size or not one_query else 2 * kv_split_size,
        kv_split_size=kv_split_size,
        few_splits=min(_forced.few_splits or few_splits, max_splits),
        max_splits=max_splits,
        num_warps=_num_warps(path, block_m, is_float32, block_d, arch),
        num_stages=_num_stages(path, block_m, is_float32, block_d, arch),
        arch=arch,
        slot_bytes=2 * head_dim * (4 if is_float32 else 2),
    )


# The tables below are the largest tiles that spill no register on sm_80, sm_90 and sm_100 (tests/test_compiles.py);
# among those that were timed (16 bits, head_dim 64 and 128), the fastest on Hopper.


def _split_rows(is_float32: bool, block_d: int) -> int:
    if is_float32:
        return 0 if block_d == 256 else WIDE_SPLIT_ROWS
    return WIDE_SPLIT_ROWS if block_d == 256 else SPLIT_ROWS


def _default_block_m(rows: int, is_float32: bool, block_d: int, arch: int) -> int:
    if is_float32:
        largest = 32 if block_d <= 64 else 16
    elif block_d == 256:
        largest = 32
    else:
        largest = 64 if arch == 90 or block_d == 128 else 128
    return min(max(16, next_power_of_2(max(rows, 1))), largest)


def _num_warps(path: Path, block_m: int, is_float32: bool, block_d: int, arch: int) -> int:
    if path in ("split_sm90", "prefill_sm90"):
        return 4  # in prompts, of a consumer
    if is_float32:
        return 4 if block_d <= 32 or (path == "prefill" and block_d == 128) else 8
    # Hopper's matrix instruction takes 64 rows for four warps.
    most_rows = 64 if arch == 90 and path == "prefill" else 16
    return 4 if block_m <= most_rows and block_d <= 128 else 8


def _num_stages(path: Path, block_m: int, is_float32: bool, block_d: int, arch: int) -> int:
    if path == "prefill_sm90":
        return SM90_TILES[block_d][block_m].num_stages
    if path == "split_sm90":
        return SM90_STAGES
    if is_float32:
        return 3 if path == "prefill" and block_d == 128 else 2
    return 3 if path == "split" or (arch == 90 and block_d <= 128) else 2


def _default_block_n(path: Path, is_decode: bool, is_float32: bool, block_d: int) -> int:
    if is_float32:
        return 32 if path == "split" and 16 < block_d < 128 else 16
    if block_d == 256 or (path == "split" and block_d == 16 and not is_decode):
        return 32
    return 128 if path == "split" and is_decode and block_d <= 64 else 64
