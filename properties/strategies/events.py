"""The regions of the input space that matter, and which of them a case lies in.

A law calls `event(region)` for each, a test counts them, `verify` prints those never reached. The names say
what is asked of a kernel, not how a kernel does it: tiles and splits are the ones the case forces.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import currently_in_test_context, event, target

from properties.case import DTYPES, FAMILIES, LAYOUTS, OPS, STARTS, TILES, Case
from properties.schedule import Outline, outline
from properties.strategies.cases import MANY_HEADS

MANY = 6  # splits: by then it shows whether a kernel merges some of them before the others
LONG = 1024  # keys: by then a kernel will have split a row on its own account

STEP_KINDS = (
    "first call",
    "first prefill",
    "chunked prefill",
    "decode",
    "multi-token decode",
    "peek",
    "fork",
    "rollback",
    "growth",
    "overflow",
    "overflow of a later row only",
    "overflow by one slot",
    "exactly full",
    "full to the limit",
    "one slot left",
    "call after an overflow",
    "call like the last one",
    "no query",
    "padding",
    "some rows idle",
    "all rows idle",
)

SHAPES = (
    "batch 0",
    "batch 1",
    "batch 2 or more",
    "ragged batch",
    "empty row beside a full one",
    "row sees no key",
    "one key",
    "queries without keys",
    "fewer keys than queries",
    "heads 1:1",
    "MQA",
    "GQA",
    "group not a power of two",
    "group of 16 or more",
    "kv heads not a power of two",
    "head_dim 1",
    "head_dim a power of two",
    "head_dim padded",
    "head_dim padded and a multiple of 8",
    "head_dim odd",
    "head_dim one past a power of two",
    "head_dim above 128",
)

LENGTHS = (
    "cached a multiple of the tile",
    "cached one past a multiple",
    "cached one short of a multiple",
    "cached within one tile",
    f"{LONG} keys or more, split left to the subject",
    "new a multiple of the tile",
    "new one past a multiple",
    "new one short of a multiple",
    "new within one tile",
    "1 split",
    "2 splits",
    "3 or more splits",
    f"{MANY} or more splits for one query",
    f"{MANY} or more splits for several queries",
    f"{MANY} or more splits of unequal rows",
    f"{MANY} or more splits of fewer than {MANY_HEADS} heads",
    f"{MANY} or more splits of {MANY_HEADS} heads or more",
    "last split full",
    "last split one key",
    "rows with unequal splits",
    "queries fill tiles",
    "queries leave a tail",
)

OPTIONS = (
    *(f"op {op}" for op in OPS),
    *(f"start {start}" for start in STARTS),
    "causal",
    "not causal",
    "causal with several queries and cached keys",
    "causal with two queries",
    "scale default",
    "scale 0",
    "scale negative",
    "scale explicit",
    "gain",
    *(f"query {name}" for name in LAYOUTS if name != "expanded_heads"),
    *(f"key {name}" for name in LAYOUTS),
    *(f"cache {name}" for name in LAYOUTS if name != "expanded_heads"),
    *(f"block_{side} {tile}" for side in "mn" for tile in (None, *TILES[:3])),
    "split forced",
    "split left to the subject",
    "1 step",
    "2 steps",
    "3 or more steps",
)

NUMBERS = tuple(f"{family} in {dtype}" for family in FAMILIES for dtype in DTYPES)

REGIONS = (*SHAPES, *LENGTHS, *STEP_KINDS, *OPTIONS, *NUMBERS)


def describe(case: Case) -> frozenset[str]:
    """The regions a case lies in; every one of them is in REGIONS."""
    calls = outline(case)
    names = {name for call in calls for name in (*_of_call(case, call), *_of_lengths(case, call))}
    names.update(_of_shape(case, calls))
    names.update(_of_options(case))
    names.update(name for a, b in pairwise(calls) for name in _of_pair(a, b))
    return frozenset(names)


def aim(**shares: float) -> None:
    """Have Hypothesis look for cases that use more of a budget: error / budget by the name of what is compared."""
    if currently_in_test_context():
        for name, share in shares.items():
            target(share, label=f"{name} error / budget")


def record(case: Case) -> None:
    """Tell Hypothesis which regions the current example lies in."""
    for region in sorted(describe(case)):
        event(region)


def _of_shape(case: Case, calls: list[Outline]) -> Iterator[str]:
    yield ("batch 0", "batch 1", "batch 2 or more")[min(case.batch, 2)]
    for call in calls:
        if len(set(call.kv_lens)) > 1:
            yield "ragged batch"
            if min(call.kv_lens) == 0:
                yield "empty row beside a full one"
        if 0 in call.kv_lens:
            yield "row sees no key"
            if call.q_len:
                yield "queries without keys"
        if 1 in call.kv_lens:
            yield "one key"
        if any(0 < keys < queries for keys, queries in zip(call.kv_lens, call.new_lens, strict=True)):
            yield "fewer keys than queries"
    group, kv_heads, d = case.group_size, case.num_kv_heads, case.head_dim
    yield "heads 1:1" if group == 1 else "MQA" if kv_heads == 1 else "GQA"
    if group & (group - 1):
        yield "group not a power of two"
    if group >= 16:
        yield "group of 16 or more"
    if kv_heads & (kv_heads - 1):
        yield "kv heads not a power of two"
    if d == 1:
        yield "head_dim 1"
    yield "head_dim padded" if d & (d - 1) else "head_dim a power of two"
    if d & (d - 1) and d % 8 == 0:
        yield "head_dim padded and a multiple of 8"
    if d % 2:
        yield "head_dim odd"
    if d > 16 and (d - 1) & (d - 2) == 0:
        yield "head_dim one past a power of two"
    if d > 128:
        yield "head_dim above 128"


def _of_lengths(case: Case, call: Outline) -> Iterator[str]:
    tile = case.block_n or TILES[0]
    cached = call.kv_lens if case.op == "attention" else call.seq_lens
    new = () if case.op == "attention" else call.new_lens
    for part, lengths in (("cached", cached), ("new", new)):
        for n in lengths:
            if n and n % tile == 0:
                yield f"{part} a multiple of the tile"
            if n > tile and n % tile == 1:
                yield f"{part} one past a multiple"
            if n % tile == tile - 1:
                yield f"{part} one short of a multiple"
            if 0 < n < tile:
                yield f"{part} within one tile"
    if case.kv_split_size is None and max(call.kv_lens, default=0) >= LONG:
        yield f"{LONG} keys or more, split left to the subject"
    query_tile = case.block_m or TILES[0]
    for n in call.new_lens:
        if n:
            yield "queries leave a tail" if n % query_tile else "queries fill tiles"
    if case.kv_split_size is not None:
        size = case.kv_split_size
        splits = [max(1, -(-n // size)) for n in call.seq_lens]
        for count in splits:
            yield ("1 split", "2 splits", "3 or more splits")[min(count, 3) - 1]
        if len(set(splits)) > 1:
            yield "rows with unequal splits"
        if max(splits, default=0) >= MANY and call.q_len:
            yield f"{MANY} or more splits for {'one query' if call.q_len == 1 else 'several queries'}"
            if len(set(splits)) > 1:
                yield f"{MANY} or more splits of unequal rows"
            few = case.batch * case.num_kv_heads < MANY_HEADS
            yield f"{MANY} or more splits of {'fewer than ' * few}{MANY_HEADS} heads{'' if few else ' or more'}"
        for n in call.seq_lens:
            if n and n % size == 0:
                yield "last split full"
            if n > size and n % size == 1:
                yield "last split one key"


def _of_call(case: Case, call: Outline) -> Iterator[str]:
    if call.q_len == 0:
        yield "no query"
    if case.op == "attention":
        return
    if not call.has_cache:
        yield "first call"
    if call.has_cache and call.stores and max(call.kv_lens, default=0) and max(call.seq_lens) == 0:
        yield "first prefill"
    for old, new in zip(call.seq_lens, call.new_lens, strict=True):
        if old and new == 1:
            yield "decode"
        elif old and 1 < new < TILES[0]:
            yield "multi-token decode"
        elif old and new >= TILES[0]:
            yield "chunked prefill"
    if not call.step.update_cache:
        yield "peek"
    if call.parent != call.index:
        yield "fork"
    if call.step.rollback and call.has_cache:
        yield "rollback"
    if call.grows:
        yield "growth"
    if call.step.padding and call.new_lens:
        yield "padding"
    if call.q_len and 0 in call.new_lens:
        yield "some rows idle" if max(call.new_lens) else "all rows idle"
    if call.overflow_row is not None:
        yield "overflow"
        if call.overflow_row > 0:
            yield "overflow of a later row only"
        if max(call.kv_lens) == case.cache_max_len + 1:
            yield "overflow by one slot"
    elif call.stores and call.kv_lens:
        needed = max(call.kv_lens)
        if case.start != "empty" and needed == case.capacity:
            yield "exactly full"
        if needed == case.cache_max_len:
            yield "full to the limit"
        if needed == case.cache_max_len - 1:
            yield "one slot left"


def _of_pair(before: Outline, after: Outline) -> Iterator[str]:
    if before.overflow_row is not None and after.overflow_row is None:
        yield "call after an overflow"
    plain = all(call.has_cache and call.stores and not call.passes_seq_lens for call in (before, after))
    if plain and after.parent == after.index and {*before.new_lens, *after.new_lens} == {before.q_len} == {after.q_len}:
        yield "call like the last one"


def _of_options(case: Case) -> Iterator[str]:
    yield f"op {case.op}"
    yield f"start {case.start}"
    yield "causal" if case.is_causal else "not causal"
    if case.is_causal and any(call.q_len > 1 and max(call.seq_lens, default=0) for call in outline(case)):
        yield "causal with several queries and cached keys"
    if case.is_causal and any(call.q_len == 2 and 2 in call.new_lens for call in outline(case)):
        yield "causal with two queries"
    if case.scale is None:
        yield "scale default"
    else:
        yield "scale explicit"
        if case.scale == 0:
            yield "scale 0"
        if case.scale < 0:
            yield "scale negative"
    if case.gain:
        yield "gain"
    yield f"query {case.query_layout}"
    yield f"key {case.key_layout}"
    if case.start != "empty":
        yield f"cache {case.cache_layout}"
    for side, tile in (("m", case.block_m), ("n", case.block_n)):
        if tile in (None, *TILES[:3]):
            yield f"block_{side} {tile}"
    yield "split left to the subject" if case.kv_split_size is None else "split forced"
    yield ("1 step", "2 steps", "3 or more steps")[min(len(case.steps), 3) - 1]
    yield f"{case.values} in {case.dtype}"
