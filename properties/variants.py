"""Other cases that a correct kernel has to treat alike: each law compares a case with one of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from properties.case import MAX_LENGTH, Case, Row, Step
from properties.values import LATTICE_EXPONENTS
from references.lattice import lattice_scale

# Families whose numbers stay far from the ends of every format, also times 8.
MODERATE = ("integers", "iota", "normal", "constant_values", "one_hot", "rising", "falling", "lattice")
MOST_SINGLE_TOKENS = 7  # each is a call of its own


def alone(case: Case, b: int) -> Case:
    """Row b without its neighbours; paddings grow so that every q_len stays."""
    rows = (case.rows[b],)
    steps = case.steps if case.op == "attention" else _steps_as_long(case, rows)
    patches = tuple(replace(patch, row=0) for patch in case.patches if patch.row == b)
    return replace(case, rows=rows, steps=steps, patches=patches)


def _steps_as_long(case: Case, rows: Sequence[Row]) -> tuple[Step, ...]:
    """The steps of a case for other rows, padded so that every q_len stays: it is part of what chooses the tiles."""
    return tuple(
        replace(step, padding=step.padding + max(row.new[s] for row in case.rows) - max(row.new[s] for row in rows))
        for s, step in enumerate(case.steps)
    )


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


def for_every_kernel(case: Case) -> Case:
    """With a head_dim that every kernel takes, and tiles left to the kernel."""
    patches = tuple(replace(patch, dim=patch.dim % 128) for patch in case.patches)
    return replace(with_tiles(case, None, None), head_dim=128, patches=patches)


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
    case = with_cache(case)
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
    case = with_cache(case)
    rows = tuple(replace(row, new=(sum(row.new),)) for row in case.rows)
    return replace(appends(case), rows=rows, steps=(Step(),))


def as_single_tokens(case: Case) -> Case:
    """The tokens of `appends`, the last ones one a call, seven at most; the rest first, in one call."""
    case = with_cache(case)
    totals = [sum(row.new) for row in case.rows]
    calls = min(MOST_SINGLE_TOKENS + 1, max([1, *totals]))
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


def roomy(case: Case) -> Case:
    """The same with a limit that no call passes."""
    if case.op == "attention":
        return case
    most = max((row.cached + sum(row.new) for row in case.rows), default=0)
    return replace(case, cache_max_len=max(1, most, case.cache_max_len))


def one_call(case: Case) -> Case:
    """The first call alone, on buffers given at the start (or of op "attention"), with room for its tokens."""
    if case.op == "attention":
        return case
    rows = tuple(replace(row, new=row.new[:1]) for row in case.rows)
    return roomy(
        replace(
            case,
            rows=rows,
            steps=(Step(case.steps[0].padding, case.steps[0].update_cache),),
            start="tuple" if case.start == "empty" else case.start,
            capacity=max([1, case.capacity, *(row.cached + row.new[0] for row in rows)]),
        )
    )


def with_cache(case: Case) -> Case:
    """A case of op "attention" as a call on a cache that holds its keys; the queries bring keys of their own."""
    if case.op != "attention":
        return case
    longest = max([1, *(row.cached for row in case.rows)])
    return roomy(replace(case, op="attention_with_kv_cache", start="tuple", capacity=longest))


def plain(case: Case) -> Case:
    """The first call as one of op "attention", for rows as long as the first."""
    first = one_call(case)
    if case.op == "attention":
        return case
    longest = max((row.cached + row.new[0] for row in first.rows), default=0)
    queries = max((row.new[0] for row in first.rows), default=0)
    return replace(
        first,
        op="attention",
        rows=tuple(Row(longest, (queries,), row.uid) for row in first.rows),
        steps=(Step(),),
        start="empty",
        capacity=0,
        cache_layout="contiguous",
        patches=(),
        kv_split_size=None,
    )


def finite(case: Case) -> Case:
    """Without elements set by hand."""
    return replace(case, patches=())


def on_the_lattice(case: Case) -> Case:
    """Numbers with which every intermediate is exact (``references.lattice``), whatever the order of the sums."""
    allowed = [lattice_scale(j) for j in range(LATTICE_EXPONENTS)]
    scale = case.scale if case.values == "lattice" and case.scale in allowed else allowed[case.seed % len(allowed)]
    return finite(with_values(case, "lattice", scale=scale))


def moderate(case: Case) -> Case:
    """Ordinary numbers under an ordinary scale, unless the case has some that neither overflow nor underflow."""
    if case.values not in MODERATE or case.scale == 0:
        return finite(with_values(case, "normal", scale=None))
    return finite(replace(case, gain=0))


def contrasting(case: Case) -> Case:
    """One call in which every argument matters: normal numbers, cached keys and at least two new tokens a row."""
    case = finite(replace(one_call(case), values="normal", gain=0, scale=None))
    rows = case.rows or (Row(),)
    if case.op == "attention":
        rows = tuple(Row(max(3, row.cached), (max(2, row.new[0]),), row.uid) for row in rows)
        return replace(case, rows=rows)
    rows = tuple(Row(max(1, row.cached), (max(2, row.new[0]),), row.uid) for row in rows)
    needs = max(row.cached + row.new[0] for row in rows)
    return roomy(replace(case, rows=rows, capacity=max(needs, case.capacity)))


def with_an_idle_row(case: Case) -> Case:
    """One row never holds a token; paddings grow so that every q_len stays.

    Of op "attention", which has no such rows, the case itself.
    """
    if not case.rows or case.op == "attention":
        return case
    b = case.seed % len(case.rows)
    idle = Row(0, (0,) * len(case.steps), case.rows[b].uid)
    rows = (*case.rows[:b], idle, *case.rows[b + 1 :])
    patches = tuple(patch for patch in case.patches if patch.row != b)
    return replace(case, rows=rows, steps=_steps_as_long(case, rows), patches=patches)


def with_a_silent_row(case: Case) -> Case:
    """One row brings no token to any call; what it has cached stays, and every q_len.

    Of op "attention", which has no such rows, the case itself.
    """
    if not case.rows or case.op == "attention":
        return case
    b = case.seed % len(case.rows)
    silent = replace(case.rows[b], new=(0,) * len(case.steps))
    rows = (*case.rows[:b], silent, *case.rows[b + 1 :])
    patches = tuple(patch for patch in case.patches if patch.row != b)
    return replace(case, rows=rows, steps=_steps_as_long(case, rows), patches=patches)


def in_short_chunks(case: Case) -> Case:
    """At most four tokens a row and call, none padding."""
    rows = tuple(replace(row, new=tuple(min(n, 4) for n in row.new)) for row in case.rows)
    return replace(case, rows=rows, steps=tuple(replace(step, padding=0) for step in case.steps))


def with_one_key(case: Case) -> Case:
    """One call whose first row sees exactly one key: its own new token; of op "attention", every row."""
    case = finite(one_call(case))
    if case.op == "attention":
        return replace(case, rows=tuple(Row(1, row.new, row.uid) for row in case.rows))
    return replace(case, rows=tuple(Row(0, (1,), row.uid) if b == 0 else row for b, row in enumerate(case.rows)))


def with_power_of_two_keys(case: Case) -> Case:
    """One non-causal call in which every row sees as many keys as the largest power of two below what it saw."""
    case = replace(finite(one_call(case)), is_causal=False)
    rows = []
    for row in case.rows:
        keys = max(1, row.cached) if case.op == "attention" else max(1, row.cached + row.new[0])
        keys = 1 << int(math.log2(keys))
        new = row.new[0] if case.op == "attention" else max(1, min(row.new[0], keys))
        rows.append(Row(keys if case.op == "attention" else keys - new, (new,), row.uid))
    return replace(case, rows=tuple(rows))


def not_causal(case: Case) -> Case:
    """Every query sees every key."""
    return replace(case, is_causal=False)


def with_own_heads(case: Case) -> Case:
    """No two heads share memory, so that a patch sets one element."""
    return replace(case, key_layout="contiguous") if case.key_layout == "expanded_heads" else case


def with_a_full_tile(case: Case, tile: int) -> Case:
    """One call whose first row (of op "attention" every row) has a tile of keys and two more, without a spare slot.

    By the seed each row brings as many tokens (of op "attention", queries) as drawn, at most one, or at most as many as
    there are keys, in tiles of that size.
    """
    first = one_call(case)
    if not case.rows:
        return first
    keys, which = tile + 2, case.seed % 4
    if which == 1:
        first = with_tiles(first, case.block_m, tile)
    most = (1, keys)[which] if which < 2 else MAX_LENGTH
    rows = [replace(row, new=(min(most, row.new[0]),)) for row in first.rows]
    rows[0] = replace(rows[0], cached=max(keys, rows[0].cached))
    if case.op == "attention":
        return replace(first, rows=tuple(replace(row, cached=rows[0].cached) for row in rows))
    return roomy(replace(first, rows=tuple(rows), capacity=max(row.cached + row.new[0] for row in rows)))


def then_again(case: Case, refuse_first: bool) -> Case:
    """A case of one call that fills its longest row to the limit; before it, if asked, one token more, refused."""
    rows = case.rows
    needs = max([1, *(row.cached + row.new[0] for row in rows)])
    limited = replace(case, cache_max_len=needs, steps=(replace(case.steps[0], update_cache=True),))
    if not refuse_first or case.op == "attention" or not rows:
        return limited
    rows = tuple(replace(row, new=(row.new[0] + 1, row.new[0])) for row in rows)
    return replace(limited, rows=rows, steps=(Step(), *limited.steps))


def limits_around(case: Case) -> list[Case]:
    """The case under the limits one slot below, at and above what one of its rows needs after the first call.

    Args:
        case: its seed chooses the row.
    """
    if case.op == "attention" or not case.rows:
        return []
    row = case.rows[case.seed % case.batch]
    least = max([1, *(r.cached for r in case.rows)])
    limits = {max(least, row.cached + row.new[0] + beyond) for beyond in (-1, 0, 1)}
    return [replace(case, cache_max_len=limit) for limit in sorted(limits)]


def steady(case: Case) -> Case:
    """After the first call all bring as many tokens, every row alike, none padding, all stored; in aligned memory.

    Calls of a server between two arrivals, or of one that speculates: what a kernel can prepare once and repeat. By the
    seed the smallest row tiles are forced, of which there may be several.
    """
    if case.op == "attention" or not case.rows:
        return case
    first, *later = case.rows[0].new
    several = {0: 2, 4: 2, 5: 17}  # with the smallest tiles of rows one more than they hold
    each = (several.get(case.seed % 8, max(1, later[0])),) * len(later) if later else ()
    rows = tuple(replace(row, new=(first, *each)) for row in case.rows)
    most = max(1, max((row.cached + sum(row.new) for row in rows), default=0))
    steps = tuple(Step(parent=step.parent, rollback=step.rollback) for step in case.steps)
    return contiguous(
        replace(
            case,
            rows=rows,
            steps=steps,
            head_dim=-(-case.head_dim // 8) * 8,
            block_m=16 if case.seed % 8 > 3 else case.block_m,
            capacity=case.capacity and max(most, case.capacity),
            cache_max_len=max(most, case.cache_max_len),
        )
    )


def growing(case: Case) -> Case:
    """Buffers that the first calls fill exactly and a later one passes, under a limit with no, little or much room."""
    if case.op == "attention" or not case.rows:
        return case
    calls = case.seed // 4 % len(case.steps)
    filled = max([1, *(row.cached + sum(row.new[:calls]) for row in case.rows)])
    most = max(row.cached + sum(row.new) for row in case.rows)
    limit = max(filled, most) + (0, 1, filled // 2, 3 * filled)[case.seed % 4]
    start = "tuple" if case.start == "empty" else case.start
    return replace(case, start=start, capacity=filled, cache_max_len=limit)


def on_a_diagonal(case: Case) -> Case:
    """Causal, without a cache, in tiles of 16: the diagonal enters them anywhere, by the seed."""
    case = finite(plain(case))
    queries = 20 + 16 * (case.seed % 3)
    keys = queries + 2 - case.seed % 19
    rows = tuple(Row(keys, (queries,), row.uid) for row in case.rows)
    return replace(case, rows=rows, is_causal=True, block_m=16, block_n=16)


def ragged_stream(case: Case) -> Case:
    """After the first call each row of each call brings another number of tokens, in one row tile of 16 or two."""
    if case.op == "attention":
        return case
    counts = (1, 0, 2, 17)
    rows = tuple(
        replace(row, new=(row.new[0], *(counts[(b + s + case.seed) % 4] for s in range(1, len(row.new)))))
        for b, row in enumerate(case.rows)
    )
    return roomy(with_tiles(replace(case, rows=rows), 16, case.block_n, case.kv_split_size))


def across_a_split(case: Case) -> Case:
    """Every row has one cached key in a split that was not there a call before, when the last call comes.

    By the seed it is the second split, as far as a row's new tokens allow. Every call goes on from the one before. Of a
    case whose splits are forced.
    """
    size = case.kv_split_size
    if case.op == "attention" or size is None:
        return case
    rows = []
    for row in case.rows:
        before = sum(row.new[:-1])
        more = (1 - row.cached - before) % size
        is_second = case.seed % 4 == 1 and before <= size
        rows.append(replace(row, cached=size + 1 - before if is_second else row.cached + more))
    most = max((row.cached + sum(row.new) for row in rows), default=0)
    return replace(
        case,
        rows=tuple(rows),
        steps=tuple(Step(padding=step.padding) for step in case.steps),
        start="tuple" if case.start == "empty" else case.start,
        capacity=max(1, most, case.capacity),
        cache_max_len=max(1, most, case.cache_max_len),
    )


def decoding(case: Case) -> Case:
    """One token a row and call, as many splits as there are tiles, and never as many in all rows.

    Of a case whose tiles are forced.
    """
    if case.op == "attention":
        return case
    extra = [case.block_n * (b % 3) for b in range(case.batch)] if case.block_n else [0] * case.batch
    rows = tuple(
        replace(row, cached=row.cached + more, new=(1,) * len(case.steps))
        for row, more in zip(case.rows, extra, strict=True)
    )
    most = max((row.cached + sum(row.new) for row in rows), default=0)
    return replace(
        case,
        rows=rows,
        steps=tuple(replace(step, padding=0) for step in case.steps),
        block_m=None,
        kv_split_size=case.block_n,
        start="tuple" if case.start == "empty" else case.start,
        capacity=max(1, most, case.capacity),
        cache_max_len=max(1, most, case.cache_max_len),
    )


def beside_grown_splits(case: Case) -> Case:
    """One token a row and call; by turns rows that three splits of a tile hold to the last call, and rows they do not.

    Of a case whose tiles are forced. Where splits become longer rather than more than three, the longer rows have two.
    """
    case = decoding(case)
    if case.op == "attention" or case.block_n is None:
        return case
    full, calls = 3 * case.block_n, len(case.steps)
    rows = tuple(
        replace(row, cached=full + 1 + b if b % 2 else max(0, full + 1 - calls)) for b, row in enumerate(case.rows)
    )
    most = max((row.cached + calls for row in rows), default=1)
    return replace(case, rows=rows, capacity=max(most, case.capacity), cache_max_len=max(most, case.cache_max_len))
