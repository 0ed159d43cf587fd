"""The life of a KVCache: what a call returns, what it shares with the one before, and when the host must look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore import CacheOverflowError, KVCache, attention_with_kv_cache
from flashcore.fast import buffers, tuning
from tests.tensors import DEVICE, lengths, memory, normal, same_bits

BATCH, HQ, HK, D = 2, 4, 2, 16


def tokens(q_len: int, seed: int = 0) -> dict[str, Any]:
    """New tokens: query, key and value."""
    return {
        "query": normal(BATCH, HQ, q_len, D, seed=3 * seed),
        "key": normal(BATCH, HK, q_len, D, seed=3 * seed + 1),
        "value": normal(BATCH, HK, q_len, D, seed=3 * seed + 2),
    }


def append(past: Any, new: dict[str, Any], **options: Any) -> tuple[Tensor, KVCache]:
    """A causal call that updates the cache."""
    out, cache = attention_with_kv_cache(**new, past_key_value=past, is_causal=True, **options)[:2]
    assert cache is not None
    return out, cache


def started(q_len: int = 4, cache_max_len: int = 16, **options: Any) -> KVCache:
    """A cache with the first ``q_len`` tokens of seed 0 in every row."""
    return append(None, tokens(q_len), cache_max_len=cache_max_len, **options)[1]


def stored(cache: KVCache, row: int) -> tuple[Tensor, Tensor]:
    """Copies of the valid keys and values of a row, [num_kv_heads, seq_len, head_dim]."""
    n = int(cache.seq_lens[row])
    return cache[0][row, :, :n].clone(), cache[1][row, :, :n].clone()


def test_a_cache_is_a_pair_of_buffers() -> None:
    cache = started()

    k_cache, v_cache = cache

    assert isinstance(cache, tuple)
    assert len(cache) == 2
    assert k_cache is cache[0]
    assert v_cache is cache[1]
    assert k_cache.shape == v_cache.shape == (BATCH, HK, 16, D)


def test_a_first_call_stores_the_new_tokens_in_the_first_slots() -> None:
    new = tokens(4)

    _, cache = append(None, new, cache_max_len=16)

    assert cache.seq_lens.dtype == torch.int32
    assert cache.seq_lens.device == new["query"].device
    assert cache.seq_lens.tolist() == [4, 4]
    assert cache.capacity == 16
    assert same_bits(cache[0][:, :, :4], new["key"])
    assert same_bits(cache[1][:, :, :4], new["value"])


def test_a_first_call_of_ragged_prompts_stores_the_real_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots at or past a row's length keep what the allocator left there."""

    def filled(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(tuple(shape), 7, dtype=dtype, device=device)

    monkeypatch.setattr(buffers, "empty", filled)

    cache = started(q_len=4, new_lens=lengths(4, 1))

    assert cache.seq_lens.tolist() == [4, 1]
    assert (cache[0][0, :, 4:] == 7).all()
    assert (cache[0][1, :, 1:] == 7).all()
    assert (cache[1][1, :, 1:] == 7).all()


def test_padding_queries_give_zero_and_an_lse_of_minus_infinity() -> None:
    result: Any = attention_with_kv_cache(**tokens(4), new_lens=lengths(4, 1), cache_max_len=4, return_lse=True)
    out, _, lse = result

    assert (out[1, :, 1:] == 0).all()
    assert (lse[1, :, 1:] == -torch.inf).all()
    assert torch.isfinite(lse[0]).all()
    assert torch.isfinite(lse[1, :, :1]).all()


def test_passing_the_cache_back_needs_no_lengths_and_appends_in_place() -> None:
    first = started()
    new = tokens(2, seed=1)

    _, second = append(first, new)

    assert second.seq_lens.tolist() == [6, 6]
    assert second[0] is first[0]
    assert second[1] is first[1]
    assert same_bits(second[0][:, :, 4:6], new["key"])
    assert same_bits(second[1][:, :, 4:6], new["value"])


def test_a_tuple_with_lengths_gives_the_same_bits_as_the_cache() -> None:
    cache = started()
    pair = (cache[0].clone(), cache[1].clone())
    new = tokens(2, seed=1)

    out, _ = append(cache, new)
    out_of_tuple, continued = append(pair, new, seq_lens=lengths(4, 4))

    assert same_bits(out, out_of_tuple)
    assert continued[0] is pair[0]
    assert continued.seq_lens.tolist() == [6, 6]


def test_the_callers_lengths_are_never_written() -> None:
    cache = started()
    seq_lens = lengths(4, 3)

    _, after = append(cache, tokens(1, seed=1), seq_lens=seq_lens)

    assert seq_lens.tolist() == [4, 3]
    assert cache.seq_lens.tolist() == [4, 4]
    assert after.seq_lens.tolist() == [5, 4]


def test_an_older_cache_stays_valid_for_its_own_length() -> None:
    """A fork: two continuations of one cache; the second overwrites the slots of the first, not what both share."""
    base = started()
    shared = stored(base, 0)
    left, right = tokens(2, seed=1), tokens(3, seed=2)

    append(base, left)
    out, forked = append(base, right)
    out_alone, _ = append(started(), right)

    assert base.seq_lens.tolist() == [4, 4]
    assert forked.seq_lens.tolist() == [7, 7]
    assert same_bits(out, out_alone)
    assert all(same_bits(a, b) for a, b in zip(stored(base, 0), shared, strict=True))


def test_a_roll_back_drops_the_newest_tokens_of_each_row() -> None:
    cache = started(q_len=6)
    new = tokens(1, seed=1)

    out, after = append(cache, new, seq_lens=lengths(4, 2))
    k_cache, v_cache = cache[0].clone(), cache[1].clone()
    k_cache[0, :, 4:], k_cache[1, :, 2:] = torch.nan, torch.nan
    v_cache[0, :, 4:], v_cache[1, :, 2:] = torch.nan, torch.nan
    out_of_short_rows, _ = append((k_cache, v_cache), new, seq_lens=lengths(4, 2))

    assert after.seq_lens.tolist() == [5, 3]
    assert same_bits(out, out_of_short_rows)
    assert same_bits(cache[0][1, :, 2:3], new["key"][1])


def test_an_allocated_cache_is_empty() -> None:
    cache = KVCache.allocate(BATCH, HK, 8, D, torch.float32, DEVICE)
    new = tokens(3)

    out, after = append(cache, new)
    out_of_first_call, _ = append(None, new, cache_max_len=8)

    assert cache.seq_lens.tolist() == [0, 0]
    assert cache.capacity == 8
    assert after[0] is cache[0]
    assert same_bits(out, out_of_first_call)


def test_full_buffers_grow_geometrically_and_keep_their_content() -> None:
    cache = started(q_len=4, cache_max_len=4)
    old = memory({"cache": cache})
    new = tokens(1, seed=1)

    _, grown = append(cache, new, cache_max_len=100)

    assert grown.capacity == 8
    assert grown[0] is not cache[0]
    assert same_bits(grown[0][:, :, :4], cache[0])
    assert same_bits(grown[1][:, :, :4], cache[1])
    assert same_bits(grown[0][:, :, 4:5], new["key"])
    assert memory({"cache": cache}) == old


def test_growth_takes_what_the_call_needs_and_stops_at_cache_max_len() -> None:
    cache = started(q_len=4, cache_max_len=4)

    assert append(cache, tokens(7, seed=1), cache_max_len=100)[1].capacity == 11
    assert append(cache, tokens(1, seed=1), cache_max_len=6)[1].capacity == 6


def test_a_cache_that_grew_is_left_behind_but_stays_valid() -> None:
    cache = started(q_len=4, cache_max_len=4)
    new = tokens(1, seed=1)
    _, grown = append(cache, tokens(2, seed=2), cache_max_len=100)

    out, again = append(cache, new, cache_max_len=100)
    out_alone, _ = append(started(q_len=4, cache_max_len=16), new)

    assert cache.capacity == 4
    assert again[0] is not grown[0]
    assert same_bits(out, out_alone)


def test_a_step_without_tokens_changes_nothing() -> None:
    cache = started()
    before = memory({"cache": cache})

    out, after = append(cache, tokens(0))

    assert out.shape == (BATCH, HQ, 0, D)
    assert after.seq_lens.tolist() == [4, 4]
    assert memory({"cache": cache}) == before


def test_a_first_call_without_tokens_makes_an_empty_cache() -> None:
    out, cache = append(None, tokens(0), cache_max_len=8)

    assert out.shape == (BATCH, HQ, 0, D)
    assert cache.seq_lens.tolist() == [0, 0]
    assert cache.capacity == 8


def test_a_row_may_get_no_tokens_while_another_gets_some() -> None:
    cache = started()
    row = stored(cache, 1)

    _, after = append(cache, tokens(2, seed=1), new_lens=lengths(2, 0))

    assert after.seq_lens.tolist() == [6, 4]
    assert all(same_bits(a, b) for a, b in zip(stored(after, 1), row, strict=True))


def test_an_empty_batch_gives_empty_results() -> None:
    result: Any = attention_with_kv_cache(
        normal(0, HQ, 3, D), normal(0, HK, 3, D), normal(0, HK, 3, D), cache_max_len=8, return_lse=True
    )
    out, cache, lse = result

    assert out.shape == (0, HQ, 3, D)
    assert lse.shape == (0, HQ, 3)
    assert cache.seq_lens.shape == (0,)
    assert cache[0].shape == (0, HK, 8, D)


@pytest.mark.parametrize("given", ["nothing", "a tuple", "a KVCache"])
def test_without_updating_no_cache_is_returned_and_nothing_is_written(given: str) -> None:
    cache = started()
    starts: dict[str, dict[str, Any]] = {
        "nothing": {},
        "a tuple": {"past_key_value": (cache[0], cache[1]), "seq_lens": lengths(4, 4)},
        "a KVCache": {"past_key_value": cache},
    }
    before = memory({"cache": cache})

    out, after = attention_with_kv_cache(**tokens(2, seed=1), update_cache=False, is_causal=True, **starts[given])[:2]

    assert after is None
    assert torch.isfinite(out).all()
    assert memory({"cache": cache}) == before


def test_updating_does_not_change_the_output() -> None:
    new = tokens(2, seed=1)

    looked = attention_with_kv_cache(**new, past_key_value=started(), update_cache=False, is_causal=True)[0]
    out, _ = append(started(), new)

    assert same_bits(looked, out)


class CountedReads:
    """Counts how often a tensor's values are read on the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            # The fault flag is host memory: reading it waits for nothing.
            self.count += tensor.shape != (2,) or tensor.data_ptr() != self.fault_address
            return original(tensor)

        self.fault_address = 0
        monkeypatch.setattr(Tensor, "tolist", tolist)

    def during(self, past: KVCache, new: dict[str, Any], **options: Any) -> tuple[int, KVCache]:
        """Reads made by one call, and the cache it returns."""
        self.count, self.fault_address = 0, past.fault.data_ptr()
        cache = append(past, new, **options)[1]
        return self.count, cache


def test_a_cache_is_passed_on_without_reading_its_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = started()
    reads = CountedReads(monkeypatch)

    count, after = reads.during(cache, tokens(2, seed=1))

    assert count == 0
    assert after.max_len == 6


def test_lengths_are_read_once_when_the_bound_does_not_fit_but_the_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of 14 + 4 passes 16 slots, but no row is longer than 5: refusing would be wrong."""
    cache = started(q_len=4, new_lens=lengths(1, 1))
    cache = KVCache(cache[0], cache[1], cache.seq_lens, max_len=14, like=cache)
    reads = CountedReads(monkeypatch)

    count, after = reads.during(cache, tokens(4, seed=1), cache_max_len=16)
    again, _ = reads.during(after, tokens(4, seed=2), cache_max_len=16)

    assert count == 1
    assert after.max_len == 5
    assert after[0] is cache[0]
    assert again == 0


def test_a_cache_without_a_bound_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = started()
    unbounded = KVCache(cache[0], cache[1], cache.seq_lens)
    reads = CountedReads(monkeypatch)

    count, after = reads.during(unbounded, tokens(1, seed=1))

    assert count == 1
    assert after.max_len == 5


def test_an_overflow_the_device_found_is_raised_once_by_check() -> None:
    cache = started()
    cache.fault[0] = 1 + 1

    with pytest.raises(CacheOverflowError, match=r"^row 1 of the cache was full .* \(capacity 16\)"):
        cache.check()
    cache.check()


def test_a_bad_length_the_device_found_is_raised_by_check() -> None:
    cache = started()
    cache.fault[1] = 0 + 1

    with pytest.raises(ValueError, match=r"^seq_lens\[0\] or new_lens\[0\] must lie inside the cache and q_len"):
        cache.check()


def test_a_fault_is_raised_by_the_next_use_of_any_cache_of_the_lineage() -> None:
    cache = started()
    _, after = append(cache, tokens(1, seed=1))
    cache.fault[0] = 0 + 1
    before = memory({"cache": after})

    with pytest.raises(CacheOverflowError, match=r"^row 0 of the cache was full"):
        append(after, tokens(1, seed=2))

    assert memory({"cache": after}) == before
    assert append(after, tokens(1, seed=2))[1].seq_lens.tolist() == [6, 6]


@pytest.mark.parametrize("length", [5, -1, 2**32 + 1])
def test_a_length_the_host_did_not_read_is_checked_on_the_device(length: int) -> None:
    """The bound says 4, so that nothing is read; a row that contradicts it is left alone, and reported."""
    cache = started()
    claimed = KVCache(cache[0], cache[1], lengths(4, length, dtype=torch.int64), max_len=4)
    row = stored(cache, 1)

    _, after = append(claimed, tokens(1, seed=1))

    with pytest.raises(ValueError, match=r"^seq_lens\[1\] or new_lens\[1\] must lie inside the cache"):
        after.check()
    assert all(same_bits(a, b) for a, b in zip(stored(cache, 1), row, strict=True))


@pytest.mark.parametrize("path", ["split", "prefill"])
def test_a_read_only_call_checks_lengths_on_the_device_too(path: tuning.Path) -> None:
    cache = started()
    claimed = KVCache(cache[0], cache[1], lengths(4, 5), max_len=4)

    with tuning.forced(path=path):
        attention_with_kv_cache(**tokens(1, seed=1), past_key_value=claimed, update_cache=False)

    with pytest.raises(ValueError, match=r"^seq_lens\[1\] or new_lens\[1\] must lie inside the cache"):
        claimed.check()


def test_a_length_within_the_bound_is_no_fault() -> None:
    cache = started()
    claimed = KVCache(cache[0], cache[1], lengths(4, 3, dtype=torch.int64), max_len=4)

    _, after = append(claimed, tokens(1, seed=1))

    after.check()
    assert after.seq_lens.tolist() == [5, 4]


def test_lineages_do_not_share_faults() -> None:
    first, second = started(), started()
    first.fault[0] = 1

    second.check()

    assert first.fault.tolist() == [1, 0]
