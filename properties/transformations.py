"""Changes to the numbers of a problem whose effect on the result mathematics says: what metamorphic laws compare.

Each takes a problem and returns another, consistent with its own case in lengths and sizes; nothing here runs a
kernel. Changes of lengths, tiles and layouts alone need no arrays: see ``properties.variants``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from properties.case import Case, Row, Step
from properties.schedule import InitialCache, PlannedStep, Problem, problem
from references.rounding import BitsArray, Float64Array, as_format, decode, encode

Change = Callable[[Float64Array], Float64Array]
# Keys and values of one row, each [num_kv_heads, keys, head_dim], to others of the same shape but for their number.
KeyChange = Callable[[int, Float64Array, Float64Array], tuple[Float64Array, Float64Array]]


def shuffled(count: int, *salt: int) -> list[int]:
    """A permutation of ``range(count)`` that looks random and depends on the salt alone."""
    return sorted(range(count), key=lambda i: zlib.crc32(f"{salt} {i}".encode()))


def exact(values: Float64Array, fmt: str) -> BitsArray:
    """Bit patterns of numbers that the format holds exactly.

    Raises:
        ValueError: it does not hold one of them; the law compares something else than it says.
    """
    bits = encode(values, as_format(fmt))
    lost = ~((decode(bits, fmt) == values) | np.isnan(values))
    if lost.any():
        raise ValueError(f"a transformed number must be exact in {fmt}, got {values[lost][0]}")
    return bits


def _with_arrays(given: Problem, case: Case, change: Callable[[str, BitsArray], BitsArray]) -> Problem:
    """Every array replaced, wherever its tensor is stored."""
    initial = given.initial
    if initial is not None:
        initial = replace(initial, key=change("key", initial.key), value=change("value", initial.value))
    steps = tuple(
        replace(
            step,
            query=change("query", step.query),
            key=change("key", step.key),
            value=change("value", step.value),
        )
        for step in given.steps
    )
    return Problem(case, initial, steps, is_transformed=True)


def changed(given: Problem, changes: dict[str, Change]) -> Problem:
    """Numbers of query, key or value replaced, element by element or token by token, wherever they are stored.

    Args:
        given: the problem.
        changes: for each tensor a function of its numbers [batch, heads, tokens, head_dim].
    """
    fmt = given.case.dtype

    def change(name: str, bits: BitsArray) -> BitsArray:
        return exact(changes[name](decode(bits, fmt)), fmt) if name in changes else bits

    return _with_arrays(given, given.case, change)


def scaled(given: Problem, tensor: str, exponent: int) -> Problem:
    """One tensor multiplied by ``2 ** exponent``."""
    return changed(given, {tensor: lambda numbers: np.ldexp(numbers, exponent)})


def negated(given: Problem, tensor: str) -> Problem:
    """One tensor with the other sign."""
    return changed(given, {tensor: np.negative})


def with_groups(given: Problem, order: Sequence[int]) -> Problem:
    """The kv heads in another order, each with its query heads: kv head g is the old kv head order[g]."""
    heads = {"query": query_heads(given.case, order), "key": list(order), "value": list(order)}
    return _with_arrays(given, given.case, lambda name, bits: bits[:, heads[name]])


def query_heads(case: Case, kv_heads: Sequence[int]) -> list[int]:
    """The query heads that use these kv heads."""
    return [g * case.group_size + i for g in kv_heads for i in range(case.group_size)]


def in_format(given: Problem, dtype: Literal["float32", "float16", "bfloat16"]) -> Problem:
    """The same numbers in another format, which must hold them."""
    case = replace(given.case, dtype=dtype, patches=())
    return _with_arrays(given, case, lambda _, bits: exact(decode(bits, given.case.dtype), dtype))


def keys_of(given: Problem, b: int) -> tuple[BitsArray, BitsArray]:
    """Keys and values that row b of a problem of one call attends to, the cached ones first."""
    step = given.steps[0]
    new = step.kv_lens[b] - step.seq_lens[b]
    key, value = step.key[b, :, :new], step.value[b, :, :new]
    if given.initial is not None:
        cached = step.seq_lens[b]
        key = np.concatenate([given.initial.key[b, :, :cached], key], axis=1)
        value = np.concatenate([given.initial.value[b, :, :cached], value], axis=1)
    return key, value


def with_keys(given: Problem, change: KeyChange) -> Problem:
    """A problem of one call whose rows attend to other keys; the last ones are the call's new tokens.

    With op "attention" every row must get the same number of keys.

    Args:
        given: the problem; the cache is given at its start, or the op is "attention".
        change: for each row its new keys and values, at least as many as the call brings.
    """
    case, step = given.case, given.steps[0]
    fmt = case.dtype
    rows = []
    for b in range(case.batch):
        key, value = change(b, *(decode(bits, fmt) for bits in keys_of(given, b)))
        rows.append((exact(key, fmt), exact(value, fmt)))
    counts = [key.shape[1] for key, _ in rows]
    if case.op == "attention":
        kept = tuple(replace(row, cached=count) for row, count in zip(case.rows, counts, strict=True))
        arrays = [np.stack([row[i] for row in rows]) if rows else (step.key, step.value)[i] for i in range(2)]
        new_step = replace(step, key=arrays[0], value=arrays[1], kv_lens=tuple(counts))
        return Problem(replace(case, rows=kept), None, (new_step,), is_transformed=True)

    cached = [count - new for count, new in zip(counts, step.new_lens, strict=True)]
    capacity = max([case.capacity, *counts])
    kept = tuple(Row(length, row.new, row.uid) for row, length in zip(case.rows, cached, strict=True))
    other = replace(case, rows=kept, capacity=capacity, cache_max_len=max(case.cache_max_len, capacity))
    blank = problem(other)
    assert blank.initial is not None
    new_step = blank.steps[0]
    # The query does not move, although its tokens now stand elsewhere.
    new_step = replace(new_step, query=step.query, key=step.key.copy(), value=step.value.copy())
    for b, (keys, values) in enumerate(rows):
        for buffer, new, bits in (
            (blank.initial.key, new_step.key, keys),
            (blank.initial.value, new_step.value, values),
        ):
            buffer[b, :, : cached[b]] = bits[:, : cached[b]]
            new[b, :, : step.new_lens[b]] = bits[:, cached[b] :]
    return Problem(other, blank.initial, (new_step,), is_transformed=True)


def with_permuted_keys(given: Problem) -> Problem:
    """Every row's keys, with their values, in another order."""

    def change(b: int, key: Float64Array, value: Float64Array) -> tuple[Float64Array, Float64Array]:
        order = shuffled(key.shape[1], given.case.seed, b)
        return key[:, order], value[:, order]

    return with_keys(given, change)


def with_halves(given: Problem) -> tuple[Problem, Problem]:
    """A problem of op "attention" twice, with the first and with the other keys; both see some if there are two."""
    count = given.steps[0].kv_lens[0] if given.case.batch else 0
    cut = count // 2 if given.case.seed % 2 else min(16, max(0, count - 1))
    first = with_keys(given, lambda _, key, value: (key[:, :cut], value[:, :cut]))
    return first, with_keys(given, lambda _, key, value: (key[:, cut:], value[:, cut:]))


def histories(given: Problem) -> list[InitialCache | None]:
    """What the cache that each call continues from holds, written down without a kernel; None on a first call."""
    caches: list[InitialCache | None] = [given.initial]
    before: list[InitialCache | None] = []
    for step in given.steps:
        parent = caches[step.parent]
        before.append(None if parent is None else replace(parent, seq_lens=step.seq_lens))
        caches.append(_appended(parent, step) if step.stores else parent)
    return before


def _appended(parent: InitialCache | None, step: PlannedStep) -> InitialCache:
    batch, heads, _, head_dim = step.key.shape
    slots = max([1, *step.kv_lens])
    buffers = []
    olds = (None, None) if parent is None else (parent.key, parent.value)
    for old, new in zip(olds, (step.key, step.value), strict=True):
        buffer = np.zeros((batch, heads, slots, head_dim), new.dtype)
        for b, (start, count) in enumerate(zip(step.seq_lens, step.new_lens, strict=True)):
            if old is not None:
                buffer[b, :, :start] = old[b, :, :start]
            buffer[b, :, start : start + count] = new[b, :, :count]
        buffers.append(buffer)
    return InitialCache(buffers[0], buffers[1], step.kv_lens)


def on_a_fresh_cache(given: Problem, s: int) -> Problem:
    """Call s alone, on buffers that hold the tokens it continues from and have never held any other."""
    case, step, past = given.case, given.steps[s], histories(given)[s]
    lengths = step.seq_lens
    slots = max([1, *lengths])
    shape = (*step.key.shape[:2], slots, step.key.shape[3])
    buffers = [np.zeros(shape, step.key.dtype) for _ in range(2)]
    for b, length in enumerate(lengths):
        for buffer, old in zip(buffers, (past.key, past.value) if past else (), strict=False):
            buffer[b, :, :length] = old[b, :, :length]
    other = replace(
        case,
        rows=tuple(Row(n, (new,), row.uid) for n, new, row in zip(lengths, step.new_lens, case.rows, strict=True)),
        steps=(Step(step.q_len - max(step.new_lens, default=0), step.step.update_cache),),
        start="tuple",
        capacity=slots,
        cache_max_len=max([slots, case.cache_max_len, *step.kv_lens]),
        cache_layout="contiguous",
        patches=(),
    )
    alone = replace(problem(other).steps[0], query=step.query, key=step.key, value=step.value)
    return Problem(other, InitialCache(buffers[0], buffers[1], lengths), (alone,), is_transformed=True)


def with_scale(given: Problem, scale: float) -> Problem:
    """The same arrays under another scale."""
    return replace(given, case=replace(given.case, scale=scale), is_transformed=True)


def with_key_offset(given: Problem, *, query: float, key: float) -> Problem:
    """Dim 0 of every query and of every key set: each logit gets query * key * scale, beside its other dims."""

    def level(offset: float) -> Change:
        return lambda numbers: np.where(np.arange(numbers.shape[-1]) == 0, offset, numbers)

    return changed(given, {"query": level(query), "key": level(key)})


def with_duplicated_keys(given: Problem) -> Problem:
    """Every key and value twice in a row."""
    return with_keys(given, lambda _, key, value: (np.repeat(key, 2, axis=1), np.repeat(value, 2, axis=1)))


def with_inert_key(given: Problem) -> Problem:
    """One more key for every row that has some, last of the cached ones: dim 0 of it is that of the others, negative.

    With op "attention" it is the last of all.
    """

    def change(b: int, key: Float64Array, value: Float64Array) -> tuple[Float64Array, Float64Array]:
        if not key.shape[1]:
            return key, value
        at = key.shape[1] if given.case.op == "attention" else given.steps[0].seq_lens[b]
        inert = np.where(np.arange(key.shape[2]) == 0, -key[:, :1], 0.0)
        return np.insert(key, at, inert[:, 0], axis=1), np.insert(value, at, 7.0, axis=1)

    return with_keys(given, change)


def with_inert_keys(given: Problem, number: float) -> Problem:
    """All keys but the last: dim 0 of each is that of the last, negative, and every element of its value ``number``."""

    def change(b: int, key: Float64Array, value: Float64Array) -> tuple[Float64Array, Float64Array]:
        del b
        is_last = np.arange(key.shape[1])[:, None] == key.shape[1] - 1
        inert = np.where(np.arange(key.shape[2]) == 0, -key[:, -1:], 0.0)
        return np.where(is_last, key, inert), np.where(is_last, value, number)

    return with_keys(given, change)


def with_one_dominant_key(given: Problem) -> tuple[Problem, list[int | None]]:
    """Logits of 0 but for one key of each row, whose logit is 256 under scale 1; every query that sees any sees it.

    Returns:
        The problem and the key's index in each row; None in a row without keys.
    """
    case, step = given.case, given.steps[0]
    winners: list[int | None] = []
    for b, keys in enumerate(step.kv_lens):
        common = max(1, keys - max(1, step.new_lens[b]) + 1) if case.is_causal else keys
        winners.append((case.seed * 5 + b) % common if keys else None)

    def change(b: int, key: Float64Array, value: Float64Array) -> tuple[Float64Array, Float64Array]:
        key = np.zeros_like(key)
        if winners[b] is not None:
            key[:, winners[b], 0] = 16.0
        return key, value

    flat = changed(given, {"query": lambda query: np.where(np.arange(query.shape[-1]) == 0, 16.0, 0.0 * query)})
    return with_scale(with_keys(flat, change), 1.0), winners


def with_newest_token_edited(given: Problem) -> Problem:
    """The last key and value of every row replaced."""

    def change(b: int, key: Float64Array, value: Float64Array) -> tuple[Float64Array, Float64Array]:
        del b
        key, value = key.copy(), value.copy()
        key[:, -1:], value[:, -1:] = 1.5, -3.0
        return key, value

    return with_keys(given, change)


def with_fewer_cached(given: Problem, count: int) -> Problem:
    """The first keys of every row dropped, as many as that and as are there beside the new tokens."""

    def change(b: int, key: Float64Array, value: Float64Array) -> tuple[Float64Array, Float64Array]:
        new = 0 if given.case.op == "attention" else given.steps[0].new_lens[b]
        lost = min(count, key.shape[1] - new)
        return key[:, lost:], value[:, lost:]

    return with_keys(given, change)
