"""What each call of a case is given and what becomes of its cache, in plain NumPy.

The semantics are those the functions under test promise: nothing here looks at their code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from properties.case import Case, Step
from properties.values import Int64Array, tokens
from references.rounding import BitsArray


@dataclass(frozen=True, eq=False)
class InitialCache:
    """The buffers given at the start.

    Attributes:
        key, value: [batch, num_kv_heads, capacity, head_dim], bit patterns; zero where nothing was written.
        seq_lens: slots valid in each row; the slots after them have never been written.
    """

    key: BitsArray
    value: BitsArray
    seq_lens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """One call.

    Attributes:
        index: of the step.
        step: its record in the case.
        parent: the cache it continues from: k is the one there is after step k - 1, 0 the initial one.
        has_cache: False on a first call, which is given no cache.
        passes_seq_lens: whether seq_lens has to be passed, because a KVCache's own is not meant.
        seq_lens: slots valid in each row before the call, after its roll-back.
        new_lens: real new tokens of each row, at most q_len.
        kv_lens: keys each row's last real query sees: seq_lens + new_lens; the keys given for op "attention".
        q_len: columns of query (and, with a cache, of key and value).
        query: [batch, num_q_heads, q_len, head_dim], bit patterns. Padding columns hold ordinary numbers.
        key, value: [batch, num_kv_heads, q_len, head_dim]; for op "attention" [.., number of keys, ..].
        overflow_row: the first row that does not fit into cache_max_len, if the call must raise.
        stores: whether the call returns a cache.
        grows: whether the buffers it is given are too short, as far as their capacity is known.
        branch: how many forks and roll-backs lie behind its tokens.
    """

    index: int
    step: Step
    parent: int
    has_cache: bool
    passes_seq_lens: bool
    seq_lens: tuple[int, ...]
    new_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q_len: int
    query: BitsArray
    key: BitsArray
    value: BitsArray
    overflow_row: int | None
    stores: bool
    grows: bool
    branch: int

    @property
    def is_padding(self) -> NDArray[np.bool_]:
        """[batch, q_len]: the columns that hold no token."""
        return np.arange(self.q_len) >= np.array(self.new_lens, np.int64)[:, None]


@dataclass(frozen=True, eq=False)
class Problem:
    """A case with its arrays: what a run is made of, and what `properties.transformations` change.

    Attributes:
        case: the lengths, sizes and options in force.
        initial: the buffers given at the start.
        steps: the calls.
        is_transformed: the arrays are no longer those that the case alone stands for.
    """

    case: Case
    initial: InitialCache | None
    steps: tuple[PlannedStep, ...]
    is_transformed: bool = False


@dataclass(frozen=True)
class Outline:
    """The lengths of one call: a `PlannedStep` without its arrays, which see for the fields."""

    index: int
    step: Step
    parent: int
    has_cache: bool
    passes_seq_lens: bool
    seq_lens: tuple[int, ...]
    new_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q_len: int
    overflow_row: int | None
    stores: bool
    grows: bool
    branch: int


@dataclass(frozen=True)
class _Cache:
    """A cache as the schedule sees it; capacity is None once the subject has chosen it."""

    seq_lens: tuple[int, ...]
    exists: bool
    capacity: int | None


def outline(case: Case) -> list[Outline]:
    """Follow the lengths of every row through the steps; no arrays are made."""
    if case.op == "attention":
        return [_attention_outline(case)]
    given = case.start != "empty"
    caches = [_Cache(tuple(row.cached for row in case.rows), given, case.capacity if given else None)]
    branch = 0
    calls = []
    for s, step in enumerate(case.steps):
        parent = s if step.parent < 0 else step.parent
        cache = caches[parent]
        if cache is not caches[s] or step.rollback:
            branch += 1
        before = tuple(max(0, length - step.rollback) for length in cache.seq_lens)
        new = tuple(row.new[s] for row in case.rows)
        after = tuple(old + more for old, more in zip(before, new, strict=True))
        full = next((b for b, length in enumerate(after) if length > case.cache_max_len), None)
        overflow_row = full if step.update_cache else None
        stores = step.update_cache and full is None
        grows = stores and cache.capacity is not None and max(after, default=0) > cache.capacity
        calls.append(
            Outline(
                index=s,
                step=step,
                parent=parent,
                has_cache=cache.exists,
                passes_seq_lens=cache.exists and (step.rollback > 0 or (parent == 0 and case.start == "tuple")),
                seq_lens=before,
                new_lens=new,
                kv_lens=after,
                q_len=max(new, default=0) + step.padding,
                overflow_row=overflow_row,
                stores=stores,
                grows=grows,
                branch=branch,
            )
        )
        if not stores:
            caches.append(cache)
        elif not cache.exists:
            caches.append(_Cache(after, True, case.cache_max_len))
        else:
            caches.append(_Cache(after, True, None if grows else cache.capacity))
    return calls


def _attention_outline(case: Case) -> Outline:
    q_lens = tuple(row.new[0] for row in case.rows)
    return Outline(
        index=0,
        step=case.steps[0],
        parent=0,
        has_cache=False,
        passes_seq_lens=False,
        seq_lens=(0,) * case.batch,
        new_lens=q_lens,
        kv_lens=tuple(row.cached for row in case.rows),
        q_len=max(q_lens, default=0),
        overflow_row=None,
        stores=False,
        grows=False,
        branch=0,
    )


def problem(case: Case) -> Problem:
    """A case with its arrays."""
    return Problem(case, initial_cache(case), tuple(plan(case)))


def plan(case: Case) -> list[PlannedStep]:
    """The calls of a case, in order, with their arrays."""
    return [planned_step(case, call) for call in outline(case)]


def planned_step(case: Case, call: Outline) -> PlannedStep:
    """One call with its arrays."""
    if case.op == "attention":
        num_keys = max(call.kv_lens, default=0)
        key_start = np.zeros(case.batch, np.int64)
        query_start = np.array(call.kv_lens, np.int64) - call.q_len
    else:
        num_keys = call.q_len
        key_start = query_start = np.array(call.seq_lens, np.int64)
    return PlannedStep(
        **vars(call),
        query=_run(case, "query", query_start, call.q_len, call.branch),
        key=_run(case, "key", key_start, num_keys, call.branch),
        value=_run(case, "value", key_start, num_keys, call.branch),
    )


def initial_cache(case: Case) -> InitialCache | None:
    """The buffers given at the start, or None if the first call is given none."""
    if case.start == "empty":
        return None
    lengths = tuple(row.cached for row in case.rows)
    longest = max(lengths, default=0)
    unwritten = np.arange(case.capacity) >= np.array(lengths, np.int64)[:, None]
    buffers = []
    for tensor in ("key", "value"):
        stored = _run(case, tensor, np.zeros(case.batch, np.int64), longest, 0)
        buffer = np.zeros((*stored.shape[:2], case.capacity, case.head_dim), stored.dtype)
        buffer[:, :, :longest] = stored
        np.moveaxis(buffer, 2, 1)[unwritten] = 0
        buffers.append(buffer)
    return InitialCache(buffers[0], buffers[1], lengths)


def _run(case: Case, tensor: str, start: Int64Array, count: int, branch: int) -> BitsArray:
    """`count` consecutive tokens of every row from its own start."""
    position = start[:, None] + np.arange(count)
    return tokens(case, tensor, position, np.full_like(position, branch))


def digest(case: Case) -> str:
    """SHA-256 of every array and length of a case, 64 hex digits: equal digests, equal problems."""
    summary = hashlib.sha256()
    initial = initial_cache(case)
    if initial is not None:
        for array in (initial.key, initial.value):
            _feed(summary, array)
    for step in plan(case):
        summary.update(f"{step.seq_lens} {step.new_lens} {step.kv_lens} {step.overflow_row};".encode())
        for array in (step.query, step.key, step.value):
            _feed(summary, array)
    return summary.hexdigest()


def _feed(summary: hashlib._Hash, array: BitsArray) -> None:
    summary.update(f"{array.shape} {array.dtype};".encode())
    # Little-endian everywhere, so that the digest is the machine's business nowhere.
    summary.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
