"""Other cases that a correct kernel has to treat alike: each law compares a case with one of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from properties.case import MAX_STEPS, Case, Row, Step


def alone(case: Case, b: int) -> Case:
    """Row b without its neighbours; paddings grow so that every q_len stays."""
    steps = tuple(
        replace(step, padding=step.padding + max(row.new[s] for row in case.rows) - case.rows[b].new[s])
        for s, step in enumerate(case.steps)
    )
    if case.op == "attention":
        steps = case.steps
    patches = tuple(replace(patch, row=0) for patch in case.patches if patch.row == b)
    return replace(case, rows=(case.rows[b],), steps=steps, patches=patches)


def permuted(case: Case, order: Sequence[int]) -> Case:
    """The rows in another order: row i is the old row order[i]."""
    if sorted(order) != list(range(case.batch)):
        raise ValueError(f"order must be a permutation of {case.batch} rows, got {list(order)}")
    patches = tuple(replace(patch, row=list(order).index(patch.row)) for patch in case.patches)
    return replace(case, rows=tuple(case.rows[b] for b in order), patches=patches)


def with_capacity(case: Case, slots: int) -> Case:
    """Given buffers of that many slots; on a first call, a cache_max_len of that many."""
    if case.start == "empty":
        return replace(case, cache_max_len=slots)
    return replace(case, capacity=slots, cache_max_len=max(slots, case.cache_max_len))


def with_tiles(case: Case, block_m: int | None, block_n: int | None, kv_split_size: int | None = None) -> Case:
    """Other tiles and splits."""
    return replace(case, block_m=block_m, block_n=block_n, kv_split_size=kv_split_size)


def with_values(case: Case, values: str, **fields: Any) -> Case:
    """Another family (and, by name, scale, gain, seed or dtype); a gain belongs to the old one."""
    return replace(case, **{"values": values, "gain": 0, **fields})


def contiguous(case: Case) -> Case:
    """The same numbers, every tensor contiguous."""
    return replace(case, query_layout="contiguous", key_layout="contiguous", cache_layout="contiguous")


def repeated_heads(case: Case) -> Case:
    """Grouped queries as plain multi-head attention: each kv head copied for every query head of its group.

    Expanded keys would share one memory between different heads, so they become contiguous.
    """
    return replace(
        case,
        num_kv_heads=case.num_q_heads,
        group_size=1,
        kv_head_copies=case.kv_head_copies * case.group_size,
        key_layout="contiguous" if case.key_layout == "expanded_heads" else case.key_layout,
        patches=tuple(
            replace(patch, head=patch.head * case.group_size + copy) if patch.tensor != "query" else patch
            for patch in case.patches
            for copy in range(case.group_size if patch.tensor != "query" else 1)
        ),
    )


def appends(case: Case) -> Case:
    """The same tokens, appended by causal steps that neither fork, roll back, peek nor overflow."""
    most = max((row.cached + sum(row.new) for row in case.rows), default=0)
    return replace(
        case,
        op="attention_with_kv_cache",
        steps=tuple(Step(step.padding) for step in case.steps),
        is_causal=True,
        cache_max_len=max(1, most, case.capacity),
        kv_split_size=case.kv_split_size,
    )


def as_single_prefill(case: Case) -> Case:
    """The tokens of `appends` in one call: query i of row b is the token after cached + i others."""
    rows = tuple(replace(row, new=(sum(row.new),)) for row in case.rows)
    return replace(appends(case), rows=rows, steps=(Step(),))


def as_single_tokens(case: Case) -> Case:
    """The tokens of `appends`, one a call, for as many calls as a case may have; the rest first, in one call."""
    totals = [sum(row.new) for row in case.rows]
    calls = min(MAX_STEPS, max([1, *totals]))
    rows = []
    for row, total in zip(case.rows, totals, strict=True):
        singles = min(total, calls - 1)
        new = (total - singles, *([1] * singles), *([0] * (calls - 1 - singles)))
        rows.append(replace(row, new=new))
    return replace(appends(case), rows=tuple(rows), steps=(Step(),) * calls)


def rows_alone(case: Case) -> list[Case]:
    """Every row without its neighbours."""
    return [alone(case, b) for b in range(case.batch)]


def with_new_length(case: Case, b: int, s: int, count: int) -> Case:
    """Row b brings another number of tokens in step s."""
    rows = list(case.rows)
    new = rows[b].new
    rows[b] = Row(rows[b].cached, (*new[:s], count, *new[s + 1 :]), rows[b].uid)
    return replace(case, rows=tuple(rows))
