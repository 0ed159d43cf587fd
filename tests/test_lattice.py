"""The lattice oracle against exact rationals, and the claim that a kernel's result on it is one pattern."""

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from references.arithmetic_model import AMPERE, HOPPER, INTERPRETER
from references.lattice import exact_attention, lattice_scale, solve
from references.lattice_inputs import (
    from_draws,
    power_of_two_exponents,
    power_of_two_from_draws,
    weight_range,
)
from references.rounding import decode, encode, round_to
from references.simulator import simulate

Shape = tuple[int, int, int, int, int]

SHAPES: list[Shape] = [  # num_kv_heads, group_size, q_len, kv_len, head_dim
    (1, 1, 1, 1, 1),
    (1, 2, 3, 5, 1),
    (2, 3, 4, 40, 2),
    (1, 1, 2, 130, 7),
    (2, 2, 5, 300, 16),
    (1, 4, 1, 1000, 64),
]
FORMATS = ["float16", "bfloat16", "float32"]


def draws(shape: Shape, seed: int = 0) -> Any:
    num_kv_heads, group_size, q_len, kv_len, head_dim = shape
    rng = np.random.default_rng([seed, *shape])
    query = rng.integers(0, 1 << 16, (num_kv_heads * group_size, q_len, head_dim))
    key, value = rng.integers(0, 1 << 16, (2, num_kv_heads, kv_len, head_dim))
    return query, key, value


def causal(q_len: int, kv_len: int) -> Any:
    return np.tril(np.ones((q_len, kv_len), bool), kv_len - q_len)


def tiles(kv_len: int, block_n: int, size: int) -> Any:
    return [
        [(i, min(kv_len, s + size, i + block_n)) for i in range(s, min(kv_len, s + size), block_n)]
        for s in range(0, kv_len, size)
    ]


def float32_of(x: Fraction) -> float:
    """The nearest float32 of a rational, ties to even, without floating-point division."""
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    spacing = Fraction(2) ** (exponent - 23)
    return float(round(x / spacing) * spacing)  # round() is ties to even


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_oracle_equals_exact_rationals(shape: Shape) -> None:
    lattice = from_draws(*draws(shape), scale_exponent=1)
    visible = causal(shape[2], shape[3])

    result = solve(lattice.query, lattice.key, lattice.value, visible, scale_exponent=1, fmt="bfloat16")

    group_size = shape[1]
    for head, i in itertools.product(range(len(lattice.query)), range(shape[2])):
        weights = [
            Fraction(2) ** Fraction(int(k @ lattice.query[head, i]), 2)
            for k in lattice.key[head // group_size, visible[i]]
        ]
        total = sum(weights, Fraction(0))
        for d in range(shape[4]):
            column = lattice.value[head // group_size, visible[i], d]
            mean: Any = sum((w * int(x) for w, x in zip(weights, column, strict=True)), Fraction(0)) / total
            assert result.out_bits[head, i, d] == encode(float32_of(mean), "bfloat16")
        assert result.lse[head, i] == pytest.approx(math.log(total), rel=1e-7, abs=1e-7)
        assert result.lse_is_exact[head, i] == (math.log2(total) == round(math.log2(total)))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_order_split_and_accumulator_gives_the_oracles_bits(shape: Shape, fmt: str) -> None:
    for seed, is_causal in itertools.product(range(3), (False, True)):
        j = seed
        lattice = from_draws(*draws(shape, seed), scale_exponent=j, key_offset=64 * seed)
        visible = causal(shape[2], shape[3]) if is_causal else np.ones((shape[2], shape[3]), bool)
        q, k, v = (decode(bits, fmt) for bits in lattice.bits(fmt))
        expected, lse = exact_attention(q, k, v, visible, j, fmt)
        exact = solve(q, k, v, visible, scale_exponent=j, fmt=fmt).lse_is_exact

        settings: Any = (
            (INTERPRETER, "blas", 64, 10_000),
            (INTERPRETER, "forward", 16, 48),
            (INTERPRETER, "reverse", 32, 32),
            (AMPERE, "blas", 32, 96),
            (HOPPER, "blas", 64, 128),
            (dataclasses.replace(HOPPER, fused_products=4, fused_fraction_bits=23), "blas", 16, 64),
        )
        for model, order, block_n, size in settings:
            out, got_lse = simulate(
                q, k, v, visible, scale=lattice.scale, fmt=fmt, model=model,
                tiles=tiles(shape[3], block_n, size), order=order,
            )  # fmt: skip
            np.testing.assert_array_equal(encode(out, fmt), expected)
            np.testing.assert_array_equal(got_lse[exact], lse[exact])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] <= s[4]])
@pytest.mark.parametrize("is_causal", [False, True])
def test_power_of_two_sums_leave_nothing_to_the_division(shape: Shape, is_causal: bool) -> None:
    _, _, q_len, kv_len, _ = shape
    visible = causal(q_len, kv_len) if is_causal else np.ones((q_len, kv_len), bool)
    lattice = power_of_two_from_draws(*draws(shape), visible_counts=visible.sum(axis=1))

    result = solve(lattice.query, lattice.key, lattice.value, visible, scale_exponent=0, fmt="float32")

    assert result.lse_is_exact.all()
    assert not result.division_sensitive.any()
    out, _ = simulate(
        lattice.query.astype(float), lattice.key.astype(float), lattice.value.astype(float), visible,
        scale=lattice.scale, fmt="float32", model=HOPPER, tiles=tiles(kv_len, 16, 64), errors="nominal",
    )  # fmt: skip
    np.testing.assert_array_equal(encode(out, "float32"), result.out_bits)


def test_division_sensitive_outputs_are_those_a_wrong_division_changes() -> None:
    lattice = from_draws(*draws((2, 2, 64, 200, 64)))
    visible = np.ones((64, 200), bool)
    result = solve(lattice.query, lattice.key, lattice.value, visible, scale_exponent=0, fmt="float16")
    numerator_over_l = solve(lattice.query, lattice.key, lattice.value, visible, scale_exponent=0, fmt="float32")
    quotient = decode(numerator_over_l.out_bits, "float32")

    changed = np.zeros(result.out_bits.shape, bool)
    for ulps in (-2, -1, 1, 2):
        moved = quotient * (1 + ulps * 2.0**-23)
        changed |= encode(round_to(moved, "float32"), "float16") != result.out_bits

    assert changed.any()
    assert not (changed & ~result.division_sensitive).any()
    assert result.division_sensitive.mean() < 0.01


@pytest.mark.parametrize("scale_exponent", range(6))
def test_scale_folds_to_a_power_of_two(scale_exponent: int) -> None:
    scale = lattice_scale(scale_exponent)
    folded = 2.0**-scale_exponent
    assert np.float32(scale) * np.float32(math.log2(math.e)) == folded
    assert np.float32(scale * math.log2(math.e)) == folded


def test_every_dimension_matters_and_logits_vary() -> None:
    lattice = from_draws(*draws((1, 8, 8, 200, 80)))
    assert (lattice.query != 0).any(axis=(0, 1)).all()
    logits = lattice.query[0] @ lattice.key[0].T
    assert np.ptp(logits, axis=1).min() >= 4


@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 64, 1000, 4097])
def test_power_of_two_exponents_sum_to_a_power_of_two(count: int) -> None:
    exponents = power_of_two_exponents(count, weight_range(count))
    assert len(exponents) == count
    total = sum(Fraction(2) ** int(e) for e in exponents)
    assert math.log2(total) == round(math.log2(total))
    assert exponents.min() >= -weight_range(count)


def test_conditions_are_refused_by_name() -> None:
    one = np.ones((1, 1, 1), np.int64)
    seen = np.ones((1, 2), bool)
    two = np.ones((1, 2, 1), np.int64)
    with pytest.raises(ValueError, match=r"^C1: .* got 20$"):
        solve(one, np.array([[[0], [20]]]), two, seen, scale_exponent=0, fmt="float16")
    with pytest.raises(ValueError, match=r"^C2: "):
        solve(one, np.array([[[0], [14]]]), two * 1024, seen, scale_exponent=0, fmt="float16")
    with pytest.raises(ValueError, match=r"^C3: "):
        solve(one * 2**20, two * 16, two, seen, scale_exponent=0, fmt="float32")
    with pytest.raises(ValueError, match=r"^C4: key "):
        solve(one, two * 257, two, seen, scale_exponent=0, fmt="bfloat16")
    with pytest.raises(ValueError, match="multiple of 2"):
        solve(one, two, two, seen, scale_exponent=1, fmt="float16")
    with pytest.raises(ValueError, match="must hold integers"):
        solve(one * 0.5, two, two, seen, scale_exponent=0, fmt="float16")
    with pytest.raises(ValueError, match="draws must lie in"):
        from_draws(one - 2, two, two)
    with pytest.raises(TypeError, match="draws must be integers"):
        from_draws(one * 0.5, two, two)
    with pytest.raises(ValueError, match="exponent_range must be between 0 and 12"):
        from_draws(one, two, two, exponent_range=13)
    with pytest.raises(ValueError, match="at most head_dim=1 distinct"):
        power_of_two_from_draws(np.ones((1, 2, 1), int), two, two, visible_counts=[1, 2])


def test_query_that_sees_nothing_is_zero() -> None:
    one = np.ones((1, 1, 1), np.int64)
    result = solve(one, one, one, np.zeros((1, 1), bool), scale_exponent=0, fmt="float16")
    assert result.out_bits.tolist() == [[[0]]]
    assert result.lse.tolist() == [[-np.inf]]
