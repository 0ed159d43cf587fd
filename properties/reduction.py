"""Make a failing case smaller without Hypothesis: a fixed list of simplifications, tried until none helps.

Used after Hypothesis has shrunk (it does not jump between distant shapes), and in its place when each trial may
kill or hang a process, where a few dozen trials are affordable and a thousand are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

from properties.case import FAMILIES, Case, CaseError, Row, Step

Fails = Callable[[Case], bool]


def size(case: Case) -> tuple[Any, ...]:
    """Order of cases by what a person would rather read: fewer tokens, fewer parts, simpler data, shorter text."""
    tokens = sum(row.cached + sum(row.new) for row in case.rows)
    padding = len(case.rows) * sum(step.padding for step in case.steps)
    elements = (tokens + padding) * (case.num_q_heads + 2 * case.num_kv_heads) * case.head_dim
    numbers = case.capacity + case.seed + abs(case.gain) + sum(row.uid for row in case.rows)
    text = repr(case)
    parts = len(case.steps) + len(case.rows) + len(case.patches)
    return parts, elements, FAMILIES.index(case.values), len(text), numbers, text


def simplifications(case: Case) -> Iterator[Case]:
    """Smaller neighbours of a case, the most drastic first; only valid ones."""
    smallest = size(case)
    for changed in _changes(case):
        try:
            neighbour = changed()
        except CaseError:
            continue
        if size(neighbour) < smallest:
            yield neighbour


def reduce(case: Case, fails: Fails, deadline: float) -> Case:
    """The smallest failing case that single simplifications lead to.

    Args:
        case: one that fails.
        fails: whether a case fails the same way.
        deadline: ``time.monotonic()`` after which the best so far is returned.
    """
    tried: set[Case] = set()
    improved = True
    while improved:
        improved = False
        for neighbour in simplifications(case):
            if time.monotonic() > deadline:
                return case
            if neighbour in tried:
                continue
            tried.add(neighbour)
            if fails(neighbour):
                case, improved = neighbour, True
                break
    return case


# What shapes the schedule; all other fields have a plainest value of their own.
_STRUCTURE = {"rows", "steps", "op", "start", "capacity", "num_kv_heads", "group_size", "head_dim", "cache_max_len"}


def _changes(case: Case) -> Iterator[Callable[[], Case]]:
    steps, rows = case.steps, case.rows
    plain = {field.name: field.default for field in fields(Case) if field.name not in _STRUCTURE}
    # Everything at once, then in large parts: a trial may cost the restart of a process.
    yield partial(replace, case, **plain, num_kv_heads=1, group_size=1, head_dim=1)
    yield partial(replace, case, **plain)
    yield partial(replace, case, num_kv_heads=1, group_size=1, head_dim=1, kv_head_copies=1)
    for keep in range(1, len(steps)):
        yield partial(_with_steps, case, list(range(keep)))
    for b in range(len(rows) if len(rows) > 2 else 0):
        yield partial(_only_row, case, b)
    for s in range(len(steps)):
        yield partial(_with_steps, case, [k for k in range(len(steps)) if k != s])
    for b in range(len(rows)):
        yield partial(_without_row, case, b)
    for p in range(len(case.patches)):
        yield partial(replace, case, patches=case.patches[:p] + case.patches[p + 1 :])
    for name in ("num_kv_heads", "group_size", "head_dim"):
        for smaller in _smaller(getattr(case, name), least=1):
            yield partial(replace, case, **{name: smaller})
    for b, row in enumerate(rows):
        for smaller in _smaller(row.cached):
            yield partial(_with_row, case, b, cached=smaller)
        for s, count in enumerate(row.new):
            for smaller in _smaller(count):
                new = (*row.new[:s], smaller, *row.new[s + 1 :])
                yield partial(_with_row, case, b, new=new)
        for smaller in _smaller(row.uid):
            yield partial(_with_row, case, b, uid=smaller)
    if len(rows) > 0 and case.op == "attention":
        # The rows of this function share their lengths, so they change together.
        for smaller in _smaller(rows[0].cached):
            yield partial(replace, case, rows=tuple(replace(row, cached=smaller) for row in rows))
        for smaller in _smaller(rows[0].new[0]):
            yield partial(replace, case, rows=tuple(replace(row, new=(smaller,)) for row in rows))
    for s, step in enumerate(steps):
        for name, default in (("update_cache", True), ("parent", -1), ("rollback", 0), ("padding", 0)):
            if getattr(step, name) != default:
                yield partial(_with_step, case, s, **{name: default})
    if case.start != "empty":
        yield partial(
            replace,
            case,
            start="empty",
            capacity=0,
            cache_layout="contiguous",
            rows=tuple(replace(row, cached=0) for row in rows),
        )
        yield partial(replace, case, start="tuple")
        for smaller in _smaller(case.capacity, least=1):
            yield partial(replace, case, capacity=smaller)
    for field in fields(Case):
        if field.name in plain and field.name != "values":
            yield partial(replace, case, **{field.name: field.default})
    yield partial(replace, case, kv_split_size=None, block_n=None)
    yield partial(replace, case, cache_max_len=Case.cache_max_len)
    for family in FAMILIES[: FAMILIES.index(case.values)]:
        yield partial(replace, case, values=family)


def _smaller(value: int, least: int = 0) -> Iterator[int]:
    """The least value, then ever smaller steps down: a threshold is found in a logarithmic number of failures."""
    if value > least:
        yield least
    step = (value - least) // 2
    while step:
        yield value - step
        step //= 2


def _with_row(case: Case, b: int, **changes: Any) -> Case:
    return replace(case, rows=(*case.rows[:b], replace(case.rows[b], **changes), *case.rows[b + 1 :]))


def _with_step(case: Case, s: int, **changes: Any) -> Case:
    return replace(case, steps=(*case.steps[:s], replace(case.steps[s], **changes), *case.steps[s + 1 :]))


def _only_row(case: Case, b: int) -> Case:
    for other in reversed(range(len(case.rows))):
        case = _without_row(case, other) if other != b else case
    return case


def _without_row(case: Case, b: int) -> Case:
    patches = tuple(replace(patch, row=patch.row - (patch.row > b)) for patch in case.patches if patch.row != b)
    return replace(case, rows=case.rows[:b] + case.rows[b + 1 :], patches=patches)


def _with_steps(case: Case, kept: list[int]) -> Case:
    """Only these steps; a parent that is gone becomes the newest cache."""
    rename = {0: 0, -1: -1} | {old + 1: new + 1 for new, old in enumerate(kept)}
    steps: tuple[Step, ...] = tuple(replace(case.steps[s], parent=rename.get(case.steps[s].parent, -1)) for s in kept)
    rows: tuple[Row, ...] = tuple(replace(row, new=tuple(row.new[s] for s in kept)) for row in case.rows)
    return replace(case, steps=steps, rows=rows)
