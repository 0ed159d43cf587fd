"""Run a case on the slot-by-slot oracle, checking the schedule's expectations on the way."""

from __future__ import annotations

from properties.case import Case
from properties.schedule import initial_cache, plan
from references.kv_cache import CacheOverflow, ReferenceCache, empty_cache, step


def follow(case: Case) -> list[ReferenceCache | None]:
    """The cache there is before step 0 and after each step; asserts that the oracle and the plan agree."""
    start: ReferenceCache | None = None
    initial = initial_cache(case)
    if initial is not None:
        start = empty_cache(case.batch, case.num_kv_heads, case.capacity, case.head_dim, case.dtype)
        start.k_bits[:], start.v_bits[:] = initial.key, initial.value
        start.seq_lens = list(initial.seq_lens)
        for b, length in enumerate(initial.seq_lens):
            start.written[b, :length] = True
    caches = [start]
    for call in plan(case):
        cache = caches[call.parent]
        assert (cache is not None) is call.has_cache
        if cache is not None and not call.passes_seq_lens:
            assert tuple(cache.seq_lens) == call.seq_lens
        if call.grows:
            assert cache is not None
            assert max(call.kv_lens) > cache.capacity
        full: int | None = None
        stored: ReferenceCache | None = None
        try:
            stored = step(
                cache,
                call.query,
                call.key,
                call.value,
                fmt=case.dtype,
                seq_lens=list(call.seq_lens),
                new_lens=list(call.new_lens),
                cache_max_len=case.cache_max_len,
                update_cache=call.step.update_cache,
                is_causal=case.is_causal,
                scale=case.softmax_scale,
            ).cache
        except CacheOverflow as overflow:
            full = overflow.row
        assert full == call.overflow_row
        assert (stored is not None) is call.stores
        if stored is not None:
            assert tuple(stored.seq_lens) == call.kv_lens
        caches.append(stored if stored is not None else cache)
    return caches
