"""The oracle on cases small enough to work out by hand, and its masks, heads and empty rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from references.attention import attention, num_visible_keys, visible_keys

Float64Array = NDArray[np.float64]


def random_inputs(
    num_q_heads: int, num_kv_heads: int, q_len: int, kv_len: int, head_dim: int = 4
) -> tuple[Float64Array, Float64Array, Float64Array]:
    rng = np.random.default_rng([num_q_heads, num_kv_heads, q_len, kv_len])
    return (
        rng.standard_normal((num_q_heads, q_len, head_dim)),
        rng.standard_normal((num_kv_heads, kv_len, head_dim)),
        rng.standard_normal((num_kv_heads, kv_len, head_dim)),
    )


def test_two_keys_worked_out_by_hand() -> None:
    # Logits log 3 and 0: weights 3/4 and 1/4, and a log-sum-exp of log 4.
    query = np.array([[[1.0, 0.0]]])
    key = np.array([[[math.log(3) / 2, 5.0], [0.0, -7.0]]])
    value = np.array([[[4.0, 0.0], [0.0, 8.0]]])

    out, lse = attention(query, key, value, is_causal=False, scale=2.0)

    assert out == pytest.approx(np.array([[[3.0, 2.0]]]), rel=1e-15)
    assert lse[0, 0] == pytest.approx(math.log(4), rel=1e-15)


def test_a_negative_scale_prefers_the_other_key() -> None:
    query, key, value = random_inputs(1, 1, 2, 3)

    out, lse = attention(query, key, value, is_causal=False, scale=-0.7)
    flipped, flipped_lse = attention(-query, key, value, is_causal=False, scale=0.7)

    assert np.array_equal(out, flipped)
    assert np.array_equal(lse, flipped_lse)
    assert not np.array_equal(out, attention(query, key, value, is_causal=False, scale=0.7)[0])


def test_scale_zero_is_the_mean() -> None:
    query, key, value = random_inputs(1, 1, 1, 4)

    out, lse = attention(query, key, value, is_causal=False, scale=0.0)

    assert out[0, 0] == pytest.approx(value[0].mean(axis=0), rel=1e-14)
    assert lse[0, 0] == math.log(4)


def test_one_key_gives_its_value_and_its_logit() -> None:
    query, key, value = random_inputs(2, 1, 1, 1)

    out, lse = attention(query, key, value, is_causal=True, scale=0.5)

    assert np.array_equal(out[:, 0], np.repeat(value[:, 0], 2, axis=0))
    assert lse[:, 0] == pytest.approx(0.5 * (query[:, 0] @ key[0, 0]), rel=1e-15)


@pytest.mark.parametrize("shift", [-1e5, 1e5])
def test_logits_far_from_zero_do_not_overflow(shift: float) -> None:
    query = np.array([[[1.0, shift]]])
    key = np.array([[[math.log(3), 1.0], [0.0, 1.0]]])

    out, lse = attention(query, key, np.array([[[4.0, 0.0], [0.0, 8.0]]]), is_causal=False, scale=1.0)

    assert out == pytest.approx(np.array([[[3.0, 2.0]]]), rel=1e-9)
    assert lse[0, 0] == pytest.approx(shift + math.log(4), rel=1e-14)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "expected"),
    [
        (2, 5, ["11110", "11111"]),
        (3, 3, ["100", "110", "111"]),
        (3, 2, ["00", "10", "11"]),
        (2, 0, ["", ""]),
    ],
)
def test_the_causal_mask_is_aligned_bottom_right(q_len: int, kv_len: int, expected: list[str]) -> None:
    mask = visible_keys(q_len, kv_len, True)

    assert ["".join("01"[int(x)] for x in row) for row in mask] == expected
    assert [num_visible_keys(i, q_len, kv_len, True) for i in range(q_len)] == mask.sum(axis=1).tolist()
    assert visible_keys(q_len, kv_len, False).all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(3, 5), (4, 4), (5, 3)])
def test_a_causal_query_is_a_full_one_on_the_keys_it_sees(q_len: int, kv_len: int) -> None:
    query, key, value = random_inputs(2, 1, q_len, kv_len)

    out, lse = attention(query, key, value, is_causal=True, scale=0.5)

    for i in range(q_len):
        n = kv_len - q_len + i + 1
        if n <= 0:
            assert np.all(out[:, i] == 0)
            assert np.all(lse[:, i] == -np.inf)
            continue
        alone = attention(query[:, i : i + 1], key[:, :n], value[:, :n], is_causal=False, scale=0.5)
        assert np.array_equal(out[:, i : i + 1], alone[0])
        assert np.array_equal(lse[:, i : i + 1], alone[1])


@pytest.mark.parametrize("group_size", [1, 2, 3, 5])
def test_query_head_h_reads_kv_head_h_over_group_size(group_size: int) -> None:
    query, key, value = random_inputs(3 * group_size, 3, 2, 4)

    out, lse = attention(query, key, value, is_causal=False, scale=0.5)
    repeated = attention(
        query, key.repeat(group_size, axis=0), value.repeat(group_size, axis=0), is_causal=False, scale=0.5
    )

    assert np.array_equal(out, repeated[0])
    assert np.array_equal(lse, repeated[1])


def test_no_keys_and_no_queries() -> None:
    query, key, value = random_inputs(2, 1, 3, 0)

    out, lse = attention(query, key, value, is_causal=False, scale=0.5)

    assert np.array_equal(out, np.zeros((2, 3, 4)))
    assert np.array_equal(lse, np.full((2, 3), -np.inf))
    assert attention(query[:, :0], key, value, is_causal=True, scale=0.5)[0].shape == (2, 0, 4)


def test_nan_in_a_hidden_key_reaches_nothing() -> None:
    query, key, value = random_inputs(2, 1, 3, 3)
    clean = attention(query[:, :2], key[:, :2], value[:, :2], is_causal=True, scale=0.5)
    key[0, 2], value[0, 2] = np.nan, np.inf

    out, lse = attention(query, key, value, is_causal=True, scale=0.5)

    assert np.array_equal(out[:, :2], clean[0])
    assert np.array_equal(lse[:, :2], clean[1])
    assert np.isnan(out[:, 2]).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_bad_value_reaches_its_dimension_only(poison: float) -> None:
    query, key, value = random_inputs(2, 2, 3, 3)
    value[1, 1, 2] = poison

    out, lse = attention(query, key, value, is_causal=True, scale=0.5)

    reached = ~np.isfinite(out)
    assert np.argwhere(reached).tolist() == [[1, 1, 2], [1, 2, 2]]
    assert np.isfinite(lse).all()


def test_heads_that_do_not_divide_are_refused() -> None:
    query, key, value = random_inputs(3, 2, 1, 1)

    with pytest.raises(ValueError) as error:
        attention(query, key, value, is_causal=False, scale=1.0)

    assert str(error.value) == "num_q_heads must be a multiple of num_kv_heads=2, got 3"
    assert attention(query[:2], key, value, is_causal=False, scale=1.0)[0].shape == (2, 1, 4)
