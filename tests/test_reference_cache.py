"""The cache as slots: what is written where, what is refused, and what forks share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from references.attention import attention
from references.kv_cache import CacheOverflow, ReferenceCache, StepResult, empty_cache, step
from references.rounding import decode, encode

FMT = "float16"
BATCH, HQ, HK, D = 2, 4, 2, 3
Bits = NDArray[np.unsignedinteger[Any]]


def tokens(q_len: int, seed: int = 0) -> tuple[Bits, Bits, Bits]:
    rng = np.random.default_rng([q_len, seed])
    shapes = ((BATCH, HQ, q_len, D), (BATCH, HK, q_len, D), (BATCH, HK, q_len, D))
    query, key, value = (encode(rng.standard_normal(shape), FMT) for shape in shapes)
    return query, key, value


def call(cache: ReferenceCache | None, new: tuple[Bits, Bits, Bits], **changes: Any) -> StepResult:
    q_len = new[0].shape[2]
    settings: dict[str, Any] = {
        "fmt": FMT,
        "seq_lens": None,
        "new_lens": [q_len] * BATCH,
        "cache_max_len": 16,
        "update_cache": True,
        "is_causal": True,
        "scale": 0.5,
    }
    return step(cache, *new, **{**settings, **changes})


def copy_of(cache: ReferenceCache) -> list[NDArray[Any]]:
    return [cache.k_bits.copy(), cache.v_bits.copy(), cache.written.copy(), np.array(cache.seq_lens)]


def unchanged(cache: ReferenceCache, before: list[NDArray[Any]]) -> bool:
    now = copy_of(cache)
    return all(np.array_equal(a, b) for a, b in zip(now, before, strict=True))


def started(q_len: int = 4, **changes: Any) -> ReferenceCache:
    cache = call(None, tokens(q_len), **changes).cache
    assert cache is not None
    return cache


def test_a_first_call_stores_the_tokens_in_the_first_slots() -> None:
    new = tokens(4)

    cache = call(None, new).cache

    assert cache is not None
    assert cache.capacity == 16
    assert cache.seq_lens == [4, 4]
    assert np.array_equal(cache.k_bits[:, :, :4], new[1])
    assert np.array_equal(cache.v_bits[:, :, :4], new[2])
    assert cache.written.tolist() == [[True] * 4 + [False] * 12] * BATCH
    assert not cache.k_bits[:, :, 4:].any()


def test_new_tokens_go_behind_each_row_s_own_length() -> None:
    cache = started(new_lens=[1, 4])
    before = copy_of(cache)
    new = tokens(3, seed=1)

    after = call(cache, new, new_lens=[3, 2]).cache

    assert after is not None
    assert after.seq_lens == [4, 6]
    assert np.array_equal(after.k_bits[0, :, 1:4], new[1][0])
    assert np.array_equal(after.v_bits[0, :, 1:4], new[2][0])
    assert np.array_equal(after.k_bits[0, :, :1], before[0][0, :, :1])
    assert np.array_equal(after.k_bits[1, :, 4:6], new[1][1, :, :2])
    assert np.array_equal(after.v_bits[1, :, 4:6], new[2][1, :, :2])
    assert np.array_equal(after.k_bits[1, :, :4], before[0][1, :, :4])
    assert after.written.sum(axis=1).tolist() == [4, 6]


def test_every_query_attends_to_the_cached_and_the_new_tokens_of_its_row() -> None:
    first, second = tokens(4), tokens(2, seed=1)
    cache = call(None, first, new_lens=[3, 4]).cache

    result = call(cache, second, new_lens=[2, 1])

    for b, (cached, new) in enumerate(((3, 2), (4, 1))):
        key = np.concatenate([first[1][b, :, :cached], second[1][b, :, :new]], axis=1)
        value = np.concatenate([first[2][b, :, :cached], second[2][b, :, :new]], axis=1)
        query = decode(second[0][b, :, :new], FMT)
        out, lse = attention(query, decode(key, FMT), decode(value, FMT), is_causal=True, scale=0.5)
        assert np.array_equal(result.out[b, :, :new], out)
        assert np.array_equal(result.lse[b, :, :new], lse)
        assert np.all(result.out[b, :, new:] == 0)
        assert np.all(result.lse[b, :, new:] == -np.inf)


def test_token_by_token_is_the_same_as_all_at_once() -> None:
    new = tokens(5)
    whole = call(None, new)
    cache = None

    for i in range(5):
        result = call(cache, tuple(x[:, :, i : i + 1] for x in new))  # type: ignore[arg-type]  # three of them
        cache = result.cache
        assert np.array_equal(result.out[:, :, 0], whole.out[:, :, i])
        assert np.array_equal(result.lse[:, :, 0], whole.lse[:, :, i])

    assert cache is not None
    assert whole.cache is not None
    assert unchanged(cache, copy_of(whole.cache))


@pytest.mark.parametrize(("new_lens", "row"), [([3, 4], 1), ([4, 3], 0), ([4, 4], 0)])
def test_overflow_names_the_first_row_and_writes_nothing(new_lens: list[int], row: int) -> None:
    cache = started(cache_max_len=7)
    before = copy_of(cache)

    with pytest.raises(CacheOverflow) as error:
        call(cache, tokens(4, seed=1), new_lens=new_lens, cache_max_len=7)

    assert error.value.row == row
    assert str(error.value) == f"row {row} needs 8 slots, cache_max_len is 7"
    assert unchanged(cache, before)
    assert call(cache, tokens(4, seed=1), new_lens=[3, 3], cache_max_len=7).cache is not None


def test_overflow_of_a_first_call() -> None:
    with pytest.raises(CacheOverflow):
        call(None, tokens(4), cache_max_len=3)

    assert call(None, tokens(3), cache_max_len=3).cache is not None


def test_without_update_nothing_is_written_and_nothing_overflows() -> None:
    cache = started(cache_max_len=5)
    before = copy_of(cache)
    new = tokens(4, seed=1)

    result = call(cache, new, cache_max_len=5, update_cache=False)

    assert result.cache is None
    assert unchanged(cache, before)
    assert np.array_equal(result.out, call(cache, new, cache_max_len=8).out)


def test_a_fork_shares_the_buffers_it_does_not_outgrow() -> None:
    cache = started()
    left = call(cache, tokens(2, seed=1)).cache
    right = call(cache, tokens(2, seed=2)).cache

    assert left is not None
    assert right is not None
    assert cache.seq_lens == [4, 4]
    assert left.k_bits is right.k_bits is cache.k_bits
    assert np.array_equal(left.k_bits[:, :, 4:6], tokens(2, seed=2)[1])


def test_growth_copies_and_leaves_the_old_buffers_alone() -> None:
    cache = empty_cache(BATCH, HK, 4, D, FMT)
    full = call(cache, tokens(4)).cache
    assert full is not None
    before = copy_of(full)

    longer = call(full, tokens(1, seed=1)).cache

    assert longer is not None
    assert longer.capacity >= 5
    assert longer.k_bits is not full.k_bits
    assert np.array_equal(longer.k_bits[:, :, :4], before[0])
    assert longer.written[:, :5].all()
    assert unchanged(full, before)


def test_growth_never_passes_the_limit() -> None:
    full = call(empty_cache(BATCH, HK, 4, D, FMT), tokens(4)).cache

    longer = call(full, tokens(1, seed=1), cache_max_len=6).cache

    assert longer is not None
    assert longer.capacity == 6


def test_a_roll_back_forgets_the_last_tokens() -> None:
    first, again = tokens(4), tokens(2, seed=1)
    cache = call(None, first).cache

    result = call(cache, again, seq_lens=[2, 3])

    assert result.cache is not None
    assert result.cache.seq_lens == [4, 5]
    assert np.array_equal(result.cache.k_bits[0, :, 2:4], again[1][0])
    short = call(None, tuple(x[:, :, :2] for x in first)).cache  # type: ignore[arg-type]  # three of them
    assert np.array_equal(call(short, again).out[0], result.out[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lens": [17, 0]}, "seq_lens[0] must be in [0, 16], got 17"),
        ({"seq_lens": [0, -1]}, "seq_lens[1] must be in [0, 16], got -1"),
        ({"seq_lens": [4, 5]}, "seq_lens[1] must cover written slots only, got 5"),
        ({"new_lens": [2, 0]}, "new_lens[0] must be in [0, 1], got 2"),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    cache = started()

    with pytest.raises(ValueError) as error:
        call(cache, tokens(1, seed=1), **changes)

    assert str(error.value) == message
    assert call(cache, tokens(1, seed=1), seq_lens=[4, 4], new_lens=[1, 0]).cache is not None


def test_an_empty_batch() -> None:
    shape = (0, HQ, 2, D)
    new = (np.zeros(shape, np.uint16), np.zeros((0, HK, 2, D), np.uint16), np.zeros((0, HK, 2, D), np.uint16))

    result = call(None, new, new_lens=[])

    assert result.out.shape == shape
    assert result.cache is not None
    assert result.cache.seq_lens == []
