"""Cases within what a kernel offers: options are taken away before drawing, relations mended after.

A kernel that offers everything gets what was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from properties.capabilities import EVERYTHING, Capabilities, NotOffered
from properties.case import Row, Step
from properties.strategies.sizes import Size

T = TypeVar("T")


def offered_of(options: Sequence[T], offered: Sequence[Any], what: str) -> tuple[T, ...]:
    """The options that a kernel offers.

    Raises:
        NotOffered: it offers none of them.
    """
    kept = tuple(option for option in options if option in offered)
    if not kept:
        raise NotOffered(f"{what} {' or '.join(map(str, options))}")
    return kept


def nearest_head_dim(head_dim: int, limits: Capabilities) -> int:
    """The one a kernel offers that is nearest to the one drawn."""
    return min(limits.head_dims, key=lambda offered: abs(offered - head_dim))


def sizes_of(size: Size, limits: Capabilities) -> Size:
    """Sizes a kernel takes."""
    if limits is EVERYTHING:
        return size
    return replace(
        size,
        max_rows=min(size.max_rows, limits.max_rows),
        max_cached=min(size.max_cached, limits.max_kv_len),
        groups=offered_of(size.groups, limits.groups, "query heads a kv head:"),
    )


def steps_of(steps: tuple[Step, ...], limits: Capabilities) -> tuple[Step, ...]:
    """Steps of the kinds a kernel knows; the others append."""
    if limits is EVERYTHING:
        return steps
    return tuple(
        Step(
            padding=step.padding if limits.padding else 0,
            update_cache=step.update_cache or not limits.peeks,
            parent=step.parent if limits.forks else -1,
            rollback=step.rollback if limits.rollbacks else 0,
        )
        for step in steps
    )


def rows_of(rows: tuple[Row, ...], limits: Capabilities) -> tuple[Row, ...]:
    """Rows of lengths a kernel takes: all like the first, never empty, one token a step."""
    if limits is EVERYTHING or not rows:
        return rows
    if not limits.ragged:
        rows = tuple(replace(row, cached=rows[0].cached, new=rows[0].new) for row in rows)
    rows = tuple(replace(row, cached=max(0, min(row.cached, limits.max_kv_len - sum(row.new)))) for row in rows)
    if not limits.padding:
        rows = tuple(replace(row, new=rows[0].new) for row in rows)
    if not limits.multi_token:
        rows = tuple(
            replace(row, new=(row.new[0] if not any(r.cached for r in rows) else 1, *(1,) * (len(row.new) - 1)))
            for row in rows
        )
    if not limits.empty:
        rows = tuple(replace(row, new=tuple(max(1, n) for n in row.new)) for row in rows)
    return rows


def plain_rows_of(rows: tuple[Row, ...], is_causal: bool, limits: Capabilities) -> tuple[Row, ...]:
    """Rows of attention without a cache: with the keys its mask is right for, and some for every query."""
    if limits is EVERYTHING:
        return rows
    for row in rows:
        keys, queries = row.cached, row.new[0]
        if is_causal and limits.alignment == "square":
            keys = queries
        if not limits.blind:
            keys = max(1, keys, queries * is_causal)
        rows = tuple(replace(each, cached=keys) for each in rows)
    return rows
