"""How large drawn cases may get: the interpreter pays milliseconds a tile, a GPU nothing, but seconds a new kernel."""

from __future__ import annotations

import os
from dataclasses import dataclass

VARIABLE = "FLASHCORE_CASE_SIZE"


@dataclass(frozen=True)
class Size:
    """Limits of one drawn case.

    Attributes:
        max_rows: of the batch.
        max_steps: of the schedule.
        max_blocks: tiles or splits a cached or new length may span.
        max_cached, max_new: tokens beyond which a length of more than one block is cut to fewer.
        tiles: what block_m and block_n are drawn from, beside None.
        splits: splits are this many tiles wide.
        kv_heads, groups: what the numbers of heads are drawn from, ascending.
        max_tiles: tiles all calls may visit together.
        max_elements: numbers all calls may be given together.
    """

    max_rows: int
    max_steps: int
    max_blocks: int
    max_cached: int
    max_new: int
    tiles: tuple[int, ...]
    splits: tuple[int, ...]
    kv_heads: tuple[int, ...]
    groups: tuple[int, ...]
    max_tiles: int
    max_elements: int


GROUPS = (1, 2, 3, 5, 6, 7, 8, 16, 24)

SIZES = {
    "small": Size(
        max_rows=4,
        max_steps=6,
        max_blocks=3,
        max_cached=192,
        max_new=96,
        tiles=(16, 32, 64),
        splits=(1, 2, 4),
        kv_heads=(1, 2, 3, 4, 5),
        groups=GROUPS,
        max_tiles=24,
        max_elements=1 << 17,
    ),
    # On a GPU a new tile is a new kernel, which takes seconds to compile: one forced tile beside those that are chosen.
    # What bounds a case there is the oracle, which runs on the CPU.
    "large": Size(
        max_rows=64,
        max_steps=6,
        max_blocks=40,
        max_cached=4096,
        max_new=1024,
        tiles=(32,),
        splits=(1, 2, 4, 16),
        kv_heads=(1, 2, 3, 4, 5, 8, 16),
        groups=(*GROUPS, 32),
        max_tiles=4000,
        max_elements=1 << 20,
    ),
}


def chosen_size(name: str | None = None) -> Size:
    """The size of that name, or the one the environment names, or "small"."""
    name = name or os.environ.get(VARIABLE, "small")
    if name not in SIZES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(SIZES)}, got {name!r}")
    return SIZES[name]
