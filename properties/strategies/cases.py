"""Whole cases: structure first, then dimensions, then limits, layouts and numbers; valid by construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from properties import capabilities
from properties.capabilities import Capabilities
from properties.case import DTYPES, FAMILIES, OPS, Case, Patch, Row, Step
from properties.schedule import Outline, outline
from properties.strategies.admitted import nearest_head_dim, offered_of, plain_rows_of, rows_of, sizes_of, steps_of
from properties.strategies.choices import Draw, choose, rarely
from properties.strategies.schedules import Units, draw_exchanges, draw_rows, draw_steps, rows_from
from properties.strategies.sizes import Size, chosen_size
from properties.values import LATTICE_EXPONENTS
from references.lattice import lattice_scale

Fields = dict[str, Any]

_COMMON_HEAD_DIMS = (16, 32, 64, 80, 96, 128)
# One past a power of two: the columns of a tile, which are one, change their number.
_HEAD_DIMS = _COMMON_HEAD_DIMS * 40 + (1,) * 10 + tuple(range(1, 257)) + (17, 33, 65, 129) * 4
_SCALES = (None, None, None, 1.0, 0.125, 0.3, -0.5, 0.0)
_LATTICE_SCALES = tuple(lattice_scale(j) for j in range(LATTICE_EXPONENTS))
# Families whose point is where their logits lie: another scale would move them.
_OWN_SCALE = ("negative_logits", "large_logits", "score_range", "one_hot")
_WITH_GAIN = ("normal", "near_ties", "constant_values")
_GAINS = (0, 0, 0, 1, -3, 3, 6)
_SPARE = (0, 1, 16, 40)
_LAYOUTS = ("contiguous", "contiguous", "transposed", "padded", "gapped")
_NON_FINITE = ("nan", "inf", "-inf")
# Keys of a row that is long enough to be split by a kernel that nobody told how, and of one a little longer.
LONG_ROWS = (1025, 1024, 1300)
# Splits of one tile each: more than any group of them that a kernel might merge first, and more of such groups.
MANY_SPLITS = (6, 9, 5, 4, 21)
# Heads of all rows together: enough of them for a kernel to give one program all splits of a row.
MANY_HEADS = 6
# One call that starts a cache, one that may be remembered, and one like it.
STEADY_STEPS = 3
# Tiles every case may visit, however often a law runs it: enough for two rows and two splits.
LEAST_TILES = 8
# Further ones for each of many splits: enough for several rows and heads.
TILES_OF_A_SPLIT = 12


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
    min_steps: int = 1,
    min_rows: int = 0,
    min_group: int = 1,
    min_kv_heads: int = 1,
    several_splits: bool = False,
    many_splits: bool = False,
    long_rows: bool = False,
    runs: int = 1,
    overflow: bool = True,
    non_finite: bool = False,
) -> Case:
    """Draw a case within what the kernel under test offers; every example is valid, none is rejected.

    Args:
        draw: given by Hypothesis.
        size: "small" for the interpreter, "large" for a GPU; default what the environment says, else "small".
        ops, families, dtypes, causal: what to draw from, simplest first; all but the first op are rare.
        max_steps: at most so many calls.
        min_steps: at least so many, unless the op is "attention".
        min_rows, min_group, min_kv_heads: at least so many rows, query heads a kv head, kv heads.
        several_splits: whether tiles and splits are forced and some row starts with more keys than a split takes;
            for ops that have a cache.
        many_splits: whether tiles and splits are the smallest and some row starts with ``MANY_SPLITS``; other cases are
            rarely like that. For ops that have a cache.
        long_rows: whether some row starts with ``LONG_ROWS`` keys, tiles and splits left to the kernel; other cases are
            rarely like that.
        runs: how often the law runs a case of this size: cases get as much smaller.
        overflow: whether calls may have to raise for want of slots.
        non_finite: whether to set one or two elements of key or value to NaN or an infinity.

    Raises:
        NotOffered: the kernel offers nothing of what the law asks for.
    """
    offers = capabilities.current()
    ops, dtypes = offered_of(ops, offers.ops, "op"), offered_of(dtypes, offers.dtypes, "dtype")
    causal = offered_of(causal, offers.masks, "is_causal")
    limits = sizes_of(_at_least(chosen_size(size), min_group, min_kv_heads), offers)
    limits = replace(limits, max_tiles=max(LEAST_TILES, limits.max_tiles // runs))
    op = choose(draw, "op", (ops[0],) * (6 - len(ops)) + tuple(ops[1:])) if len(ops) > 1 else ops[0]
    plain = op == "attention"
    steps = steps_of(draw_steps(draw, min(limits.max_steps, max_steps or limits.max_steps), min_steps), offers)
    drafts = draw_rows(draw, limits, min_rows)
    if rarely(draw, "no rows", 30) and not (min_rows or several_splits) and offers.empty:
        drafts = []
    exchanges = draw_exchanges(draw, len(drafts), len(steps))
    nothing_cached = rarely(draw, "nothing cached", 4)
    steady = rarely(draw, "steady decode", 6) and not plain and (max_steps or limits.max_steps) >= STEADY_STEPS
    if steady:
        steps, exchanges = (Step(),) * max(STEADY_STEPS, len(steps)), []
    fills_split = rarely(draw, "steady decode fills a split", 2)
    long_row = choose(draw, "long row", LONG_ROWS if long_rows else (0,) * 30 + LONG_ROWS)
    many = choose(draw, "many splits", MANY_SPLITS if many_splits else (0,) * 20 + MANY_SPLITS)
    many = 0 if plain or long_rows else many
    alike = choose(draw, "rows of many splits", (True, False))
    crowded = choose(draw, "heads of many splits", (False, True)) and bool(many)

    block_n = choose(draw, "block_n", limits.tiles if several_splits else (None, *limits.tiles))
    block_m = choose(draw, "block_m", (None, *limits.tiles))
    splits = choose(draw, "kv_split_size", limits.splits if several_splits else (None, *limits.splits))
    kv_split_size = block_n * splits if block_n and splits and not plain else None
    if many:
        block_n = kv_split_size = limits.tiles[0]
        long_row = 0
        limits = replace(limits, max_tiles=limits.max_tiles + TILES_OF_A_SPLIT * many)
    tile, split = block_n or 16, kv_split_size or 64
    cached, new = Units(tile, split, limits.max_cached), Units(tile, split, limits.max_new)
    rows = rows_from(drafts, exchanges, len(steps), cached, new)
    keys = choose(draw, "keys beside the queries'", ("included", "included", "apart", "fewer"))
    if long_row and rows and not several_splits:
        block_n = kv_split_size = None
        rows = (replace(rows[0], cached=long_row), *rows[1:])
        # Whole heads of 128 for one row: the more columns, the shorter the splits a kernel would make.
        limits = replace(
            limits, max_tiles=limits.max_tiles + long_row // 32, max_elements=max(limits.max_elements, long_row << 9)
        )
        nothing_cached = False
    if plain:
        steps = (Step(),)
        rows = tuple(_attention_row(rows[0], row.uid, keys) for row in rows)
    elif many:
        rows = tuple(_in_splits(row, many, split) if alike or row is rows[0] else row for row in rows)
    elif several_splits:
        if rows[0].cached <= split:
            rows = (replace(rows[0], cached=split + max(1, rows[0].cached)), *rows[1:])
    elif nothing_cached:
        rows = tuple(replace(row, cached=0) for row in rows)

    rows = rows_of(rows, offers)
    fewest = max(min_steps, STEADY_STEPS) if steady else min_steps
    least = (1 if plain else fewest, max(min_rows, 1), several_splits or bool(many or long_row))
    most_tiles = limits.max_tiles // (math.ceil(MANY_HEADS / max(1, len(rows))) if crowded else 1)
    schedule = _Schedule(op, rows, steps, block_m, block_n).within(most_tiles, *least)
    if crowded and schedule.rows:
        heads = math.ceil(MANY_HEADS / len(schedule.rows))
        limits = _at_least(limits, limits.groups[0], min(heads, limits.kv_heads[-1]))
    if steady and fills_split and kv_split_size and schedule.rows:
        missing = -max(row.cached + row.new[0] for row in schedule.rows) % kv_split_size
        rows = rows_of(tuple(replace(row, cached=row.cached + missing) for row in schedule.rows), offers)
        schedule = _Schedule(op, rows, schedule.steps, block_m, block_n)
    fields: Fields = {"op": op, "rows": schedule.rows, "steps": schedule.steps}
    if offers.tiles:
        fields |= {"block_m": block_m, "block_n": block_n, "kv_split_size": kv_split_size}
    fields |= _dimensions(draw, schedule, limits, offers)
    fields |= {
        "dtype": choose(draw, "dtype", tuple(dtypes)),
        "is_causal": choose(draw, "causal", tuple(causal)),
    }
    if plain:
        fields["rows"] = plain_rows_of(fields["rows"], fields["is_causal"], offers)
    fields |= _slots(draw, schedule, overflow and offers.overflow, offers)
    fields |= _layouts(draw, fields, offers)
    if steady:
        fields |= _as_they_lie(fields, offers)
    fields |= numbers(draw, tuple(families))
    if not offers.scale_is_offered(fields["scale"]):
        fields["scale"] = None
    if non_finite and schedule.rows:
        fields |= {"patches": _patches(draw, fields)}
    return Case(**fields)


def _at_least(limits: Size, group: int, kv_heads: int) -> Size:
    """The limits without fewer heads than that."""
    groups = tuple(n for n in limits.groups if n >= group)
    return replace(limits, groups=groups, kv_heads=tuple(n for n in limits.kv_heads if n >= kv_heads))


def _in_splits(row: Row, splits: int, split: int) -> Row:
    """The row with so many splits, the last one as full as it was."""
    return replace(row, cached=splits * split - -row.cached % split)


def _attention_row(first: Row, uid: int, keys: str) -> Row:
    """A row of op "attention": the last call of a cache of the same lengths, or as many keys as were cached, or less.

    Fewer keys than queries: the first queries see none of them when causal.
    """
    q_len = first.new[0]
    counts = {"included": first.cached + q_len, "apart": first.cached, "fewer": min(first.cached, q_len // 2)}
    return Row(counts[keys], (q_len,), uid)


class _Schedule:
    """The rows and steps of a case that never wants for slots, with the outline of its calls."""

    def __init__(
        self,
        op: str,
        rows: tuple[Row, ...],
        steps: tuple[Step, ...],
        block_m: int | None,
        block_n: int | None,
    ) -> None:
        self.op, self.rows, self.steps, self.block_m, self.block_n = op, rows, steps, block_m, block_n
        self.longest = max((row.cached for row in rows), default=0)
        fields: Fields = {"rows": rows, "steps": steps, "op": op}
        if op != "attention":
            most = max((row.cached + sum(row.new) for row in rows), default=0)
            fields |= {"start": "tuple", "capacity": max(1, self.longest), "cache_max_len": max(1, most)}
        self.calls: list[Outline] = outline(Case(**fields))

    def tiles(self, group_size: int) -> int:
        """Tiles all calls visit for one key/value head."""
        return sum(
            math.ceil(max(1, call.q_len * group_size) / (self.block_m or 32)) * (1 + kv_len // (self.block_n or 32))
            for call in self.calls
            for kv_len in call.kv_lens
        )

    def tokens(self) -> int:
        """Tokens all calls are given or see, for one head."""
        return sum(call.q_len + kv_len for call in self.calls for kv_len in call.kv_lens)

    def within(self, max_tiles: int, min_steps: int, min_rows: int, keep_cached: bool) -> _Schedule:
        """Drop last rows and last steps, in turn, then what is cached, until one head fits the limit."""
        rows, steps = self.rows, self.steps
        if not rows or self.tiles(1) <= max_tiles:
            return self
        few = len(steps) <= min_steps
        if len(rows) > min_rows and (few or len(rows) + 1 >= len(steps)):
            rows = rows[:-1]
        elif not few:
            steps = steps[:-1]
            rows = tuple(replace(row, new=row.new[:-1]) for row in rows)
        elif any(row.cached for row in rows) and not keep_cached:
            rows = tuple(replace(row, cached=0) for row in rows)
        else:
            return self
        smaller = _Schedule(self.op, rows, steps, self.block_m, self.block_n)
        return smaller.within(max_tiles, min_steps, min_rows, keep_cached)


def _largest_within(options: Sequence[int], chosen: int, fits: Any) -> int:
    """The chosen option, or the largest before it that fits, or the first."""
    return next((n for n in reversed(options[: options.index(chosen) + 1]) if fits(n)), options[0])


def _dimensions(draw: Draw, schedule: _Schedule, limits: Size, offers: Capabilities) -> Fields:
    """Heads and head_dim: as many as the schedule leaves room for, the smallest always."""
    num_kv_heads = _largest_within(
        limits.kv_heads,
        choose(draw, "num_kv_heads", limits.kv_heads),
        lambda n: n * schedule.tiles(1) <= limits.max_tiles,
    )
    group_size = _largest_within(
        limits.groups,
        choose(draw, "group_size", limits.groups),
        lambda g: num_kv_heads * schedule.tiles(g) <= limits.max_tiles,
    )
    room = limits.max_elements // max(1, schedule.tokens() * num_kv_heads * (group_size + 2))
    head_dim = choose(draw, "head_dim", _HEAD_DIMS)
    if head_dim > room:  # cut to a multiple of 16, which kernels read as it lies
        head_dim = min(head_dim, max(16, room // 16 * 16))
    if head_dim not in offers.head_dims:
        head_dim = nearest_head_dim(head_dim, offers)
    return {"num_kv_heads": num_kv_heads, "group_size": group_size, "head_dim": head_dim}


def _slots(draw: Draw, schedule: _Schedule, overflow: bool, offers: Capabilities) -> Fields:
    """How the cache is given, and how many slots: enough, or one more or less than some row needs."""
    start = choose(draw, "start", ("empty", "tuple", "kv_cache"))
    given = _slot_count(draw, "capacity", schedule)
    spare = choose(draw, "cache_max_len spare", _SPARE)
    limit = _slot_count(draw, "cache_max_len", schedule)
    limited = rarely(draw, "cache_max_len limits", 3)
    if schedule.op == "attention":
        return {}
    if start == "empty" and schedule.longest:
        start = "tuple"
    # Below what is cached already, even a call that brings no token would have to be refused.
    least = max(1, schedule.longest)
    if not offers.growth:
        given = max(given, _needs(schedule)[0])
    capacity = max(least, given) if start != "empty" else 0
    roomy = max(least, _needs(schedule)[0], capacity) + spare
    return {
        "start": start,
        "capacity": capacity,
        "cache_max_len": max(least, limit) if limited and overflow else roomy,
    }


def _needs(schedule: _Schedule) -> list[int]:
    """Slots the rows need at some step, the largest number first."""
    lengths = {length for call in schedule.calls if call.stores for length in call.kv_lens}
    return sorted({schedule.longest, *lengths}, reverse=True)


def _slot_count(draw: Draw, name: str, schedule: _Schedule) -> int:
    """What some row needs at some step, one slot more or less, or room to spare."""
    needs = _needs(schedule)
    which = choose(draw, f"{name} need", tuple(range(8)))
    beyond = choose(draw, f"{name} beyond", (0, 0, -1, -1, 1, 16))
    return needs[which % len(needs)] + beyond


def _layouts(draw: Draw, fields: Fields, offers: Capabilities) -> Fields:
    """How each tensor group lies in memory; expanded heads hold the same numbers."""
    query = choose(draw, "query_layout", _LAYOUTS)
    key = choose(draw, "key_layout", (*_LAYOUTS, "expanded_heads"))
    cache = choose(draw, "cache_layout", _LAYOUTS)
    query, key, cache = (layout if layout in offers.layouts else "contiguous" for layout in (query, key, cache))
    return {
        "query_layout": query,
        "key_layout": key,
        "kv_head_copies": fields["num_kv_heads"] if key == "expanded_heads" else 1,
        "cache_layout": cache if fields.get("capacity") else "contiguous",
    }


def _as_they_lie(fields: Fields, offers: Capabilities) -> Fields:
    """Sizes and layouts that nobody has to copy: calls alike may then be one launch, repeated with other pointers."""
    layouts = {name: fields[name] for name in ("query_layout", "key_layout", "cache_layout")}
    aligned = "padded" if "padded" in offers.layouts else "contiguous"
    changed = {name: aligned if layout == "gapped" else layout for name, layout in layouts.items()}
    head_dim = 8 * math.ceil(fields["head_dim"] / 8)
    return {**changed, "head_dim": head_dim if head_dim in offers.head_dims else fields["head_dim"]}


def numbers(draw: Draw, families: tuple[str, ...]) -> Fields:
    """The family, and the scale and gain that go with it."""
    values = choose(draw, "values", families)
    scale = choose(draw, "scale", _SCALES)
    lattice = choose(draw, "lattice scale", _LATTICE_SCALES)
    gain = choose(draw, "gain", _GAINS)
    seed = choose(draw, "seed", tuple(range(64)))
    if values == "lattice":
        scale = lattice
    elif values == "coherent":
        scale = 1.0
    elif values in _OWN_SCALE:
        scale = None
    return {"values": values, "scale": scale, "gain": gain if values in _WITH_GAIN else 0, "seed": seed}


def _patches(draw: Draw, fields: Fields) -> tuple[Patch, ...]:
    """One or two elements of key or value that are not finite."""
    patches: list[Patch] = []
    for p in range(2):
        kind = choose(draw, f"patches[{p}].tensor", (None, "key", "value"))
        if kind is None and patches:
            break
        b = choose(draw, f"patches[{p}].row", tuple(range(8))) % len(fields["rows"])
        row = fields["rows"][b]
        tokens = row.cached + (sum(row.new) if fields["op"] != "attention" else 0)
        # Counted from the newest token: the one every later step sees, too.
        age = choose(draw, f"patches[{p}].age", tuple(range(64)))
        if choose(draw, f"patches[{p}].is_recent", (True, False)):
            age %= max(1, *row.new)  # where a diagonal hides it from some queries and shows it to others
        patches.append(
            Patch(
                tensor="value" if kind == "value" else "key",
                row=b,
                token=max(0, tokens - 1 - age),
                head=choose(draw, f"patches[{p}].head", tuple(range(16))) % fields["num_kv_heads"],
                dim=choose(draw, f"patches[{p}].dim", tuple(range(256))) % fields["head_dim"],
                value=choose(draw, f"patches[{p}].value", _NON_FINITE),
            )
        )
    return tuple(patches)
