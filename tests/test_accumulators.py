"""The simulated tensor core against the same rule in exact rationals, one product at a time."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from references.accumulators import Float64Array, blas_dot, forward_dot, reverse_dot, tensor_core_dot
from references.rounding import BFLOAT16, FLOAT16, Format, round_to


def exponent_of(x: float, smallest: int) -> int:
    return max(math.frexp(x)[1] - 1, smallest)


def cut(x: Fraction, spacing: Fraction) -> Fraction:
    return math.trunc(x / spacing) * spacing


def scalar_step(a: Float64Array, b: Float64Array, c: float, fraction_bits: int, fmt: Format) -> float:
    """One fused step: align, cut, add exactly, cut to 24 bits."""
    exponents = [
        exponent_of(x, fmt.emin) + exponent_of(y, fmt.emin) for x, y in zip(a, b, strict=True) if x != 0 and y != 0
    ]
    exponents += [exponent_of(c, -126)] if c else []
    if not exponents:
        return 0.0
    spacing = Fraction(2) ** (max(exponents) - fraction_bits)
    total = cut(Fraction(c), spacing)
    total += sum(cut(Fraction(float(x)) * Fraction(float(y)), spacing) for x, y in zip(a, b, strict=True))
    if total == 0:
        return 0.0
    exponent = exponent_of(float(total), -126)
    if abs(total) < Fraction(2) ** exponent and exponent > -126:  # float() rounded up to a power of two
        exponent -= 1
    return float(cut(total, Fraction(2) ** (exponent - 23)))


def operands(fmt: Format, seed: int, spread: int) -> tuple[Float64Array, Float64Array, Float64Array]:
    rng = np.random.default_rng([seed, spread])

    def draw(*shape: int) -> Float64Array:
        x = rng.standard_normal(shape) * np.exp2(rng.integers(-spread, min(spread, 12) + 1, shape))
        return round_to(np.where(rng.random(shape) < 0.1, 0.0, x), fmt)

    return draw(2, 33), draw(33, 2), rng.standard_normal((2, 2)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("terms", "fraction_bits"), [(4, 23), (8, 24), (16, 25)])
@pytest.mark.parametrize("spread", [0, 4, 18])
def test_every_bit_is_that_of_the_rule(fmt: Format, terms: int, fraction_bits: int, spread: int) -> None:
    for seed in range(12):
        a, b, c = operands(fmt, seed, spread)
        a[:, 0], b[0, :] = -a[:, 1], b[1, :]  # two products that cancel

        got = tensor_core_dot(
            a,
            b,
            c.astype(np.float32),
            terms=terms,
            fraction_bits=fraction_bits,
            smallest_normal=fmt.smallest_normal,
        )

        for i, j in itertools.product(range(2), range(2)):
            expected = c[i, j]
            for start in range(0, a.shape[1], terms):
                step = slice(start, start + terms)
                expected = scalar_step(a[i, step], b[step, j], expected, fraction_bits, fmt)
            assert got[i, j] == expected


def test_a_subnormal_factor_counts_with_the_smallest_normal_exponent() -> None:
    """2**-24 * 1 is aligned as if it were 2**-14, so beside it 2**-40 is cut off at F = 25."""
    a, b = np.array([[2.0**-24, 2.0**-14]]), np.array([[1.0], [2.0**-26]])
    lost = tensor_core_dot(a, b, np.zeros((1, 1), np.float32), terms=4, fraction_bits=25, smallest_normal=2.0**-14)
    kept = tensor_core_dot(a, b, np.zeros((1, 1), np.float32), terms=4, fraction_bits=26, smallest_normal=2.0**-14)
    assert lost[0, 0] == 2.0**-24
    assert kept[0, 0] == 2.0**-24 + 2.0**-40


def test_ieee_orders_round_every_addition() -> None:
    """1 then two halves of an ulp is 1; the halves first make an ulp."""
    a, b = np.array([[1.0, 2.0**-24, 2.0**-24]]), np.ones((3, 1))
    zero = np.zeros((1, 1), np.float32)
    assert forward_dot(a, b, zero)[0, 0] == 1.0
    assert reverse_dot(a, b, zero)[0, 0] == 1.0 + 2.0**-23
    assert blas_dot(a[:, 1:], b[1:], np.ones((1, 1), np.float32))[0, 0] == 1.0 + 2.0**-23
