"""What the references say of one call: its results, and what each of its rows attended to."""

from __future__ import annotations

import numpy as np

from properties.case import Case
from properties.schedule import InitialCache, PlannedStep
from properties.subjects import Subject
from references import kv_cache
from references.attention import Float64Array, attention, visible_keys
from references.error_bounds import Sequence
from references.kv_cache import CacheOverflow, ReferenceCache
from references.rounding import BitsArray, decode


def reference_cache(given: InitialCache | None) -> ReferenceCache | None:
    """The cache a case starts with."""
    if given is None:
        return None
    written = np.arange(given.key.shape[2]) < np.array(given.seq_lens, np.int64)[:, None]
    return ReferenceCache(given.key.copy(), given.value.copy(), written, list(given.seq_lens))


def results(
    case: Case, planned: PlannedStep, parent: ReferenceCache | None
) -> tuple[Float64Array, Float64Array, ReferenceCache | None] | None:
    """What one call returns and the cache there is after it, by explicit loops; None where it must overflow."""
    if case.op == "attention":
        numbers = [decode(array, case.dtype) for array in (planned.query, planned.key, planned.value)]
        rows = [
            attention(*(array[b] for array in numbers), is_causal=case.is_causal, scale=case.softmax_scale)
            for b in range(case.batch)
        ]
        shape = planned.query.shape
        return (
            np.array([row[0] for row in rows]).reshape(shape),
            np.array([row[1] for row in rows]).reshape(shape[:3]),
            None,
        )
    try:
        result = kv_cache.step(
            parent,
            planned.query,
            planned.key,
            planned.value,
            fmt=case.dtype,
            seq_lens=list(planned.seq_lens) if parent is not None else None,
            new_lens=list(planned.new_lens),
            cache_max_len=case.cache_max_len,
            update_cache=planned.step.update_cache,
            is_causal=case.is_causal,
            scale=case.softmax_scale,
        )
    except CacheOverflow as overflow:
        if overflow.row != planned.overflow_row:
            raise RuntimeError("references and schedule disagree on the row that overflows") from None
        return None
    return result.out, result.lse, result.cache or parent


def attended(case: Case, subject: Subject, planned: PlannedStep, parent: ReferenceCache | None) -> list[Sequence]:
    """What the real queries of each row attend to, and in which order."""
    found = []
    for b in range(case.batch):
        query, key, value = (decode(array, case.dtype) for array in _row(case, planned, parent, b))
        visible = visible_keys(query.shape[1], key.shape[1], case.is_causal)
        cached = planned.seq_lens[b] if case.op == "attention_with_kv_cache" else key.shape[1]
        tiles = subject.tiles(case, planned.q_len, cached, key.shape[1] - cached)
        found.append(Sequence(query, key, value, visible, tiles))
    return found


def _row(
    case: Case, planned: PlannedStep, parent: ReferenceCache | None, b: int
) -> tuple[BitsArray, BitsArray, BitsArray]:
    """Queries of one row and the keys and values they attend to, cached ones first."""
    if case.op == "attention":
        return planned.query[b], planned.key[b], planned.value[b]
    new, cached = planned.new_lens[b], planned.seq_lens[b]
    key, value = planned.key[b, :, :new], planned.value[b, :, :new]
    if parent is not None:
        key = np.concatenate([parent.k_bits[b, :, :cached], key], axis=1)
        value = np.concatenate([parent.v_bits[b, :, :cached], value], axis=1)
    return planned.query[b, :, :new], key, value
