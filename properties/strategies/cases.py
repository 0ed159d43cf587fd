"""Whole cases: structure first, then dimensions, then limits, layouts and numbers; valid by construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from properties.case import DTYPES, FAMILIES, OPS, Case, Patch, Row, Step
from properties.schedule import Outline, outline
from properties.strategies.schedules import rarely, row_drafts, step_drafts, steps_from
from properties.strategies.sizes import Size, chosen_size
from properties.values import LATTICE_EXPONENTS
from references.lattice import lattice_scale

Fields = dict[str, Any]

_HEAD_DIMS = (16, 32, 64, 80, 96, 128)
_SCALES = (None, None, None, 1.0, 0.125, 0.3, -0.5, 0.0)
# Families whose point is where their logits lie: another scale would move them.
_OWN_SCALE = ("negative_logits", "large_logits", "score_range", "one_hot")
_WITH_GAIN = ("normal", "near_ties", "constant_values")
_GAINS = (0, 0, 0, 1, -3, 3, 6)
_SPARE = (0, 1, 16, 40)
_NON_FINITE = ("nan", "inf", "-inf")


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    size: str | None = None,
    ops: Sequence[str] = OPS,
    families: Sequence[str] = FAMILIES,
    dtypes: Sequence[str] = DTYPES,
    causal: Sequence[bool] = (False, True),
    max_steps: int | None = None,
    overflow: bool = True,
    non_finite: bool = False,
) -> Case:
    """Draw a case; every example is valid, none is rejected.

    Args:
        draw: given by Hypothesis.
        size: "small" for the interpreter, "large" for a GPU; default what the environment says, else "small".
        ops, families, dtypes, causal: what to draw from, simplest first.
        max_steps: at most so many calls.
        overflow: whether calls may have to raise for want of slots.
        non_finite: whether to set one or two elements of key or value to NaN or an infinity.
    """
    limits = chosen_size(size)
    op = draw(st.sampled_from(ops)) if len(ops) == 1 or draw(rarely(6)) else ops[0]
    steps: tuple[Step, ...] = (Step(),)
    if op != "attention":
        most = min(limits.max_steps, max_steps or limits.max_steps)
        steps = steps_from(draw(st.lists(step_drafts(), min_size=1, max_size=most)))
    drafts = []
    if not draw(rarely(40)):
        row = row_drafts(limits.max_blocks, len(steps))
        drafts = draw(st.lists(row, min_size=1, max_size=limits.max_rows))

    block_n = draw(st.sampled_from((None, *limits.tiles)))
    block_m = draw(st.sampled_from((None, *limits.tiles)))
    splits = [None] if block_n is None or op == "attention" else [None, *(m * block_n for m in limits.splits)]
    kv_split_size = draw(st.sampled_from(splits))
    tile = block_n or 16
    rows = tuple(draft.row(len(steps), tile, kv_split_size or 2 * tile, limits) for draft in drafts)
    if op == "attention":
        rows = tuple(Row(rows[0].cached, rows[0].new, row.uid) for row in rows)
    elif draw(st.booleans()) and draw(st.booleans()):
        rows = tuple(replace(row, cached=0) for row in rows)

    rows, steps, calls = _within(limits.max_tiles, rows, steps, op, block_m, block_n)
    fields: Fields = {"rows": rows, "steps": steps, "op": op, "block_m": block_m, "block_n": block_n}
    fields |= draw(_dimensions(calls, limits, block_m, block_n))
    fields |= {"kv_split_size": kv_split_size, "dtype": draw(st.sampled_from(dtypes))}
    fields |= {"is_causal": draw(st.sampled_from(causal))}
    if op != "attention":
        fields |= draw(_slots(rows, calls, overflow))
    fields |= draw(_layouts(fields))
    fields |= draw(_numbers(families))
    if non_finite and rows:
        fields |= {"patches": tuple(draw(st.lists(_patches(fields), min_size=1, max_size=2)))}
    return Case(**fields)


def _unlimited(rows: tuple[Row, ...], steps: tuple[Step, ...], op: str) -> list[Outline]:
    """The calls of a schedule that never wants for slots."""
    if op == "attention":
        return outline(Case(rows=rows, steps=steps, op="attention"))
    longest = max((row.cached for row in rows), default=0)
    most = max((row.cached + sum(row.new) for row in rows), default=0)
    return outline(
        Case(rows=rows, steps=steps, start="tuple", capacity=max(1, longest), cache_max_len=max(1, most))
    )


def _tiles(calls: list[Outline], group_size: int, block_m: int | None, block_n: int | None) -> int:
    """Tiles all calls visit for one key/value head."""
    return sum(
        math.ceil(max(1, call.q_len * group_size) / (block_m or 32)) * (1 + kv_len // (block_n or 32))
        for call in calls
        for kv_len in call.kv_lens
    )


def _within(
    max_tiles: int,
    rows: tuple[Row, ...],
    steps: tuple[Step, ...],
    op: str,
    block_m: int | None,
    block_n: int | None,
) -> tuple[tuple[Row, ...], tuple[Step, ...], list[Outline]]:
    """Drop the last steps, then the last rows, then what is cached, until one head fits the limit."""
    calls = _unlimited(rows, steps, op)
    while _tiles(calls, 1, block_m, block_n) > max_tiles:
        if len(steps) > 1:
            steps = steps[:-1]
            rows = tuple(replace(row, new=row.new[:-1]) for row in rows)
        elif len(rows) > 1:
            rows = rows[:-1]
        elif rows[0].cached:
            rows = (replace(rows[0], cached=0),)
        else:
            break
        calls = _unlimited(rows, steps, op)
    return rows, steps, calls


@st.composite
def _dimensions(
    draw: st.DrawFn, calls: list[Outline], limits: Size, block_m: int | None, block_n: int | None
) -> Fields:
    """Heads and head_dim: as many as the schedule leaves room for, the smallest always."""
    per_head = max(1, _tiles(calls, 1, block_m, block_n))
    num_kv_heads = draw(
        st.sampled_from([n for n in limits.kv_heads if n == 1 or n * per_head <= limits.max_tiles])
    )
    group_size = draw(
        st.sampled_from(
            [
                g
                for g in limits.groups
                if g == 1 or num_kv_heads * _tiles(calls, g, block_m, block_n) <= limits.max_tiles
            ]
        )
    )
    tokens = sum(max(call.kv_lens, default=0) + call.q_len for call in calls) * len(calls[0].kv_lens)
    room = limits.max_elements // max(1, tokens * num_kv_heads * (group_size + 2))
    largest = max(16, min(256, room))
    head_dim = draw(st.sampled_from([d for d in _HEAD_DIMS if d <= largest]) | st.integers(1, largest))
    return {"num_kv_heads": num_kv_heads, "group_size": group_size, "head_dim": head_dim}


@st.composite
def _slots(draw: st.DrawFn, rows: tuple[Row, ...], calls: list[Outline], overflow: bool) -> Fields:
    """How the cache is given, and how many slots: enough, or one more or less than some row needs."""
    longest = max((row.cached for row in rows), default=0)
    needs = sorted(
        {longest, *(length for call in calls if call.stores for length in call.kv_lens)}, reverse=True
    )
    start = draw(st.sampled_from(("tuple", "kv_cache") if longest else ("empty", "tuple", "kv_cache")))
    capacity = 0
    if start != "empty":
        capacity = max(1, longest, draw(_slot_counts(needs)))
    # Below what is cached already, even a call that stores nothing would have to be refused.
    enough = max(1, needs[0], capacity)
    cache_max_len = enough + draw(st.sampled_from(_SPARE))
    if overflow and draw(rarely(3)):
        cache_max_len = max(1, longest, draw(_slot_counts(needs)))
    return {"start": start, "capacity": capacity, "cache_max_len": cache_max_len}


def _slot_counts(needs: list[int]) -> st.SearchStrategy[int]:
    """Some row's need at some step, the largest first, and one slot to either side, or room to spare."""
    edges = st.builds(lambda need, d: need + d, st.sampled_from(needs), st.sampled_from((0, -1, 1)))
    return edges | st.sampled_from(_SPARE).map(lambda spare: needs[0] + spare)


@st.composite
def _layouts(draw: st.DrawFn, fields: Fields) -> Fields:
    """How each tensor group lies in memory; expanded heads hold the same numbers."""
    plain = ("contiguous", "contiguous", "transposed", "gapped")
    expandable = fields["num_kv_heads"] > 1
    key_layout = draw(st.sampled_from((*plain, "expanded_heads") if expandable else plain))
    return {
        "query_layout": draw(st.sampled_from(plain)),
        "key_layout": key_layout,
        "kv_head_copies": fields["num_kv_heads"] if key_layout == "expanded_heads" else 1,
        "cache_layout": draw(st.sampled_from(plain)) if fields.get("capacity") else "contiguous",
    }


@st.composite
def _numbers(draw: st.DrawFn, families: Sequence[str]) -> Fields:
    """The family, and the scale and gain that go with it."""
    values = draw(st.sampled_from(families))
    scale: float | None = None
    if values == "lattice":
        scale = lattice_scale(draw(st.integers(0, LATTICE_EXPONENTS - 1)))
    elif values == "coherent":
        scale = 1.0
    elif values not in _OWN_SCALE:
        scale = draw(st.sampled_from(_SCALES))
    gain = draw(st.sampled_from(_GAINS)) if values in _WITH_GAIN else 0
    return {"values": values, "scale": scale, "gain": gain, "seed": draw(st.integers(0, 255))}


@st.composite
def _patches(draw: st.DrawFn, fields: Fields) -> Patch:
    """One element of key or value that is not finite."""
    row = draw(st.integers(0, len(fields["rows"]) - 1))
    tokens = fields["rows"][row].cached + (sum(fields["rows"][row].new) if fields["op"] != "attention" else 0)
    return Patch(
        tensor=draw(st.sampled_from(("key", "value"))),
        row=row,
        token=draw(st.integers(0, max(0, tokens - 1))),
        head=draw(st.integers(0, fields["num_kv_heads"] - 1)),
        dim=draw(st.integers(0, fields["head_dim"] - 1)),
        value=draw(st.sampled_from(_NON_FINITE)),
    )
