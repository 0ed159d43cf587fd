"""The last steps to a minimal case: changes a person would try, made to the case itself.

Hypothesis shrinks choices, and stops where only two changes together would keep the failure (a shorter prompt
and a longer cache, another start and another limit). Here whole fields change, and the rest is made to fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from properties.case import DTYPES, FAMILIES, LAYOUTS, OPS, STARTS, Case, CaseError, Row, Step
from properties.schedule import outline

_HEAD_DIMS = (16, 32, 64, 80, 96, 128)


Fails = Callable[[Case], bool]


def reduce(case: Case, fails: Fails, deadline: float) -> Case:
    """The simplest failing case that changes of a few fields lead to.

    Args:
        case: one that fails.
        fails: whether a case fails the same way.
        deadline: `time.monotonic()` after which the best so far is returned.
    """
    tried: set[Case] = set()
    improved = True
    while improved:
        improved = False
        for simpler in simplifications(case):
            if time.monotonic() > deadline:
                return case
            if simpler in tried:
                continue
            tried.add(simpler)
            if fails(simpler):
                case, improved = simpler, True
                break
    return case


def simplifications(case: Case) -> Iterator[Case]:
    """Simpler cases near this one, bold changes first; only valid ones."""
    bound = size(case)
    for change in _changes(case):
        try:
            neighbour = _fitted(case, change)
        except CaseError:
            continue
        if size(neighbour) < bound:
            yield neighbour


def size(case: Case) -> tuple[Any, ...]:
    """What makes one case simpler than another, the weightiest first."""
    needs, limit = _needs(case)
    return (
        OPS.index(case.op),
        case.batch if case.batch else 1,
        len(case.steps),
        sum((not s.update_cache) + (s.parent >= 0) + (s.rollback > 0) + (s.padding > 0) for s in case.steps),
        case.num_q_heads,
        case.num_kv_heads,
        len(case.patches),
        _head_dim_rank(case.head_dim),
        sum(abs(n - 1) + (n == 0) for row in case.rows for n in row.new),
        sum(row.cached for row in case.rows),
        sum(step.rollback + step.padding for step in case.steps),
        case.start != "empty" and case.capacity != needs,
        case.cache_max_len != limit,
        STARTS.index(case.start),
        case.capacity,
        case.cache_max_len,
        case.kv_split_size or 0,
        case.block_n or 0,
        case.block_m or 0,
        sum(LAYOUTS.index(name) for name in (case.query_layout, case.key_layout, case.cache_layout)),
        case.kv_head_copies,
        FAMILIES.index(case.values),
        case.is_causal,
        case.scale is not None,
        DTYPES.index(case.dtype),
        abs(case.gain),
        case.seed,
        sum(row.uid for row in case.rows),
        [row.uid for row in case.rows],
        [[-row.cached, *(-n for n in row.new)] for row in case.rows],
    )


# The plainest value of each field that does not shape the schedule.
_PLAIN: dict[str, Any] = {
    "dtype": Case.dtype,
    "is_causal": Case.is_causal,
    "scale": Case.scale,
    "query_layout": Case.query_layout,
    "key_layout": Case.key_layout,
    "cache_layout": Case.cache_layout,
    "block_m": Case.block_m,
    "block_n": Case.block_n,
    "kv_split_size": Case.kv_split_size,
    "values": Case.values,
    "gain": Case.gain,
    "seed": Case.seed,
    "patches": (),
    "kv_head_copies": Case.kv_head_copies,
}
_SMALL: dict[str, Any] = {"num_kv_heads": 1, "group_size": 1, "head_dim": 16}


def _changes(case: Case) -> Iterator[dict[str, Any]]:
    rows, steps = case.rows, case.steps
    # Everything at once, then in large parts: a trial may cost the restart of a process.
    yield {**_PLAIN, **_SMALL}
    yield _PLAIN
    yield {**_SMALL, "kv_head_copies": 1, "key_layout": "contiguous", "patches": ()}
    for b in range(len(rows) if len(rows) > 2 else 0):
        kept = (replace(patch, row=0) for patch in case.patches if patch.row == b)
        yield {"rows": (rows[b],), "patches": tuple(kept)}
    if case.op == "attention":
        q_lens = [row.new[0] for row in rows]
        yield {
            "op": OPS[0],
            "rows": tuple(replace(row, cached=max(0, row.cached - n)) for row, n in zip(rows, q_lens, strict=True)),
        }
    for b in range(len(rows)):
        if len(rows) > 1:
            yield {"rows": rows[:b] + rows[b + 1 :], "patches": tuple(_without_row(case, b))}
    for s in range(len(steps)):
        if len(steps) > 1:
            fewer = tuple(_moved(step, s) for step in steps[:s] + steps[s + 1 :])
            dropped = tuple(replace(row, new=row.new[:s] + row.new[s + 1 :]) for row in rows)
            yield {"rows": dropped, "steps": fewer}
            # The same tokens, in the cache from the start.
            cached = tuple(replace(row, cached=row.cached + old.new[s]) for row, old in zip(dropped, rows, strict=True))
            yield {"rows": cached, "steps": fewer}
    for s, step in enumerate(steps):
        for plainer in (Step(), *_plainer(step)):
            yield {"steps": (*steps[:s], plainer, *steps[s + 1 :])}
    for p in range(len(case.patches)):
        yield {"patches": case.patches[:p] + case.patches[p + 1 :]}
    plain = {"key_layout": "contiguous"} if case.key_layout == "expanded_heads" else {}
    for heads in range(1, case.num_kv_heads):
        for group in {1, case.group_size, case.num_q_heads}:
            yield {"num_kv_heads": heads, "group_size": group, "kv_head_copies": 1, **plain}
            yield {"num_kv_heads": heads, "group_size": group, "kv_head_copies": heads}
    for group in range(1, case.group_size):
        yield {"group_size": group}
    for d in (*_HEAD_DIMS, case.head_dim // 2, case.head_dim - 1):
        yield {"head_dim": d}
    yield from _shorter(case)
    yield from _other_slots(case)
    yield {"kv_split_size": None}
    yield {"kv_split_size": None, "block_n": None}
    yield {"kv_split_size": case.block_n}
    yield {"kv_split_size": 16 if case.kv_split_size else None, "block_n": 16}
    yield {"block_m": None}
    yield {"block_m": 16}
    yield {"kv_head_copies": 1, **plain}
    for name in ("query_layout", "key_layout", "cache_layout"):
        for layout in ("contiguous", "transposed"):
            yield {name: layout}
    yield {"scale": None}
    for family in FAMILIES[: FAMILIES.index(case.values)]:
        yield {"values": family, "gain": 0, "scale": None}
        yield {"values": family}
    for dtype in DTYPES[: DTYPES.index(case.dtype)]:
        yield {"dtype": dtype}
    yield {"is_causal": False}
    yield {"gain": 0}
    for seed in range(min(case.seed, 4)):
        yield {"seed": seed}
    yield {"rows": tuple(replace(row, uid=0) for row in rows)}
    yield {"rows": tuple(replace(row, uid=b) for b, row in enumerate(rows))}


def _shorter(case: Case) -> Iterator[dict[str, Any]]:
    """Other lengths, for one row or for all."""
    rows = case.rows
    every = tuple(range(len(rows)))
    for chosen in (every, *((b,) for b in every if len(rows) > 1)):
        for cached in sorted({0, 1, *(n for b in chosen for n in _below(rows[b].cached))}):
            yield {"rows": _with(rows, chosen, [replace(row, cached=min(cached, row.cached)) for row in rows])}
        for s in range(len(case.steps)):
            for new in sorted({1, 0, *(n for b in chosen for n in _below(rows[b].new[s]))}):
                yield {"rows": _with(rows, chosen, [_new(row, s, min(new, row.new[s])) for row in rows])}
            # The same number of keys, most of them cached.
            yield {"rows": _with(rows, chosen, [_cached_instead(row, s) for row in rows])}
    for a in every:
        for b in every:
            if a < b:
                order = list(rows)
                order[a], order[b] = order[b], order[a]
                yield {"rows": tuple(order), "patches": ()}


def _other_slots(case: Case) -> Iterator[dict[str, Any]]:
    """Other starts and limits: exactly enough, exactly what is cached, one fewer."""
    needs, limit = _needs(case)
    longest = max((row.cached for row in case.rows), default=0)
    for start in STARTS:
        yield {"start": start, "capacity": needs, "cache_max_len": limit}
        yield {"start": start, "capacity": longest, "cache_max_len": max(1, longest)}
        yield {"start": start, "capacity": needs}
        yield {"start": start, "capacity": longest}
    for most in (limit, longest, case.cache_max_len - 1):
        yield {"cache_max_len": max(1, most)}


def _fitted(case: Case, change: dict[str, Any]) -> Case:
    """The case with some fields changed, and the others as they then have to be."""
    fields = {**vars(case), **change}
    longest = max((row.cached for row in fields["rows"]), default=0)
    if fields["op"] == "attention":
        return Case(**fields)
    if fields["start"] == "empty" and longest:
        fields["start"] = "tuple"
    if fields["start"] == "empty":
        fields |= {"capacity": 0, "cache_layout": "contiguous"}
    elif "capacity" not in change:
        roomy = _needs(case)[0] == case.capacity or case.start == "empty"
        fields["capacity"] = max(1, longest) if not roomy else _roomy(fields)
    fields["capacity"] = max(fields["capacity"], max(1, longest)) if fields["start"] != "empty" else 0
    if "cache_max_len" not in change and case.cache_max_len == _needs(case)[1]:
        fields["cache_max_len"] = max(_roomy(fields), fields["capacity"])
    return Case(**fields)


def _roomy(fields: dict[str, Any]) -> int:
    """Slots the schedule needs if nothing limits it."""
    longest = max((row.cached for row in fields["rows"]), default=0)
    most = max((row.cached + sum(row.new) for row in fields["rows"]), default=0)
    unlimited = Case(
        rows=fields["rows"],
        steps=fields["steps"],
        start="tuple",
        capacity=max(1, longest),
        cache_max_len=max(1, most),
    )
    calls = outline(unlimited)
    return max([1, longest, *(length for call in calls if call.stores for length in call.kv_lens)])


def _needs(case: Case) -> tuple[int, int]:
    """(slots the schedule needs, the limit that just allows them)."""
    if case.op == "attention":
        return 0, case.cache_max_len
    needs = _roomy(vars(case))
    return needs, max(needs, case.capacity)


def _head_dim_rank(d: int) -> tuple[int, int]:
    return (_HEAD_DIMS.index(d), 0) if d in _HEAD_DIMS else (len(_HEAD_DIMS), d)


def _below(n: int) -> tuple[int, ...]:
    return tuple(m for m in (n // 2, n - 64, n - 32, n - 16, n - 1) if m > 0)


def _plainer(step: Step) -> Iterator[Step]:
    yield replace(step, padding=0)
    yield replace(step, padding=1)
    yield replace(step, rollback=0)
    yield replace(step, rollback=1)
    yield replace(step, parent=-1)
    yield replace(step, update_cache=True)


def _moved(step: Step, dropped: int) -> Step:
    """The step after another one is gone: cache k is the one after step k - 1."""
    return replace(step, parent=step.parent - 1) if step.parent > dropped else step


def _without_row(case: Case, b: int) -> Iterator[Any]:
    for patch in case.patches:
        if patch.row != b:
            yield replace(patch, row=patch.row - (patch.row > b))


def _with(rows: tuple[Row, ...], chosen: tuple[int, ...], changed: list[Row]) -> tuple[Row, ...]:
    return tuple(changed[b] if b in chosen else row for b, row in enumerate(rows))


def _new(row: Row, s: int, count: int) -> Row:
    return replace(row, new=(*row.new[:s], count, *row.new[s + 1 :]))


def _cached_instead(row: Row, s: int) -> Row:
    return replace(_new(row, s, min(1, row.new[s])), cached=row.cached + max(0, row.new[s] - 1))
