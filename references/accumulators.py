"""Dot products as hardware accumulates them: IEEE float32 in three orders, and tensor cores bit for bit.

A tensor core does not add like IEEE arithmetic. It takes K products and the running value C in one
fused step: all K + 1 terms are aligned to the largest exponent among them, cut off (toward zero) below F
fractional bits of that exponent, added exactly, and the sum is cut off (toward zero) to float32. The
exponent of a product is the sum of its factors' exponents, not normalised, and a subnormal factor counts
with the smallest exponent of its *format*.

    Volta K=4 F=23, Ampere and Ada K=8 F=24, Hopper K=16 F=25

Source: Fasi, Higham, Mikaitis, Pranesh 2021 ("Numerical behavior of NVIDIA tensor cores"); Khattak and
Mikaitis 2025; the bit-accurate simulator MMA-Sim (2025). `python -m properties probe` measures K, F and
the rounding on the device at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

EXPONENT_BITS = np.int64(0x7FF0_0000_0000_0000)
# Clearing the low 29 of float64's 52 fraction bits leaves the 23 of float32.
FLOAT32_BITS = np.int64(~((1 << 29) - 1))
SMALLEST_NORMAL = 2.0**-126

# (a [M, K], b [K, N], c [M, N]) -> c + a @ b, all holding exactly representable values.
Dot = Callable[[Float64Array, Float64Array, Float32Array], Float32Array]


def truncate_to_float32(x: Float64Array) -> Float32Array:
    """Round to float32 toward zero; past the largest finite value, to infinity as hardware does."""
    cut = (x.view(np.int64) & FLOAT32_BITS).view(np.float64)
    tiny = np.abs(x) < SMALLEST_NORMAL
    if tiny.any():
        cut = np.where(tiny, np.trunc(x * 2.0**149) * 2.0**-149, cut)
    with np.errstate(over="ignore"):
        return cut.astype(np.float32)


def power_of(x: Float64Array, smallest: float) -> Float64Array:
    """2**exponent of every element: 0 for 0, and at least `smallest` otherwise."""
    power = (x.view(np.int64) & EXPONENT_BITS).view(np.float64)
    return np.where(x != 0, np.maximum(power, smallest), 0.0)


def tensor_core_dot(
    a: Float64Array,
    b: Float64Array,
    c: Float32Array,
    *,
    terms: int,
    fraction_bits: int,
    smallest_normal: float,
) -> Float32Array:
    """Carry c through fused steps of `terms` products each.

    Args:
        a: [M, K] values of the input format.
        b: [K, N] values of the input format.
        c: [M, N] the accumulator before the first step.
        terms: products in one fused step.
        fraction_bits: bits kept below the largest exponent of a step.
        smallest_normal: 2**emin of the input format, the exponent a subnormal factor counts with.

    Returns:
        [M, N] the accumulator after the last step.
    """
    # Terms along the leading axis: the reductions over a step then run over contiguous planes.
    a_terms = np.ascontiguousarray(a.T)  # [K, M]
    b_terms = np.ascontiguousarray(b)  # [K, N]
    a_power = power_of(a_terms, smallest_normal)
    b_power = power_of(b_terms, smallest_normal)
    total = c.astype(np.float64)
    for start in range(0, a_terms.shape[0], terms):
        step = slice(start, start + terms)
        power = a_power[step, :, None] * b_power[step, None, :]  # [terms, M, N]
        largest = np.maximum(power.max(axis=0), power_of(total, SMALLEST_NORMAL))
        largest[largest == 0] = 1.0
        to_integer = 2.0**fraction_bits / largest
        products = np.multiply(a_terms[step, :, None], b_terms[step, None, :], out=power)
        products *= to_integer
        np.trunc(products, out=products)
        total *= to_integer
        np.trunc(total, out=total)
        total += products.sum(axis=0)
        total /= to_integer
        total = truncate_to_float32(total).astype(np.float64)
    return total.astype(np.float32)


def blas_dot(a: Float64Array, b: Float64Array, c: Float32Array) -> Float32Array:
    """Add NumPy's float32 matmul to c: some IEEE order, chosen by the BLAS."""
    return c + a.astype(np.float32) @ b.astype(np.float32)


def forward_dot(a: Float64Array, b: Float64Array, c: Float32Array) -> Float32Array:
    """Add one product after the other to c, first key first, each sum rounded (a chain of FMAs)."""
    total = c.astype(np.float64)
    for term in range(a.shape[1]):
        total += a[:, term, None] * b[term]
        total = total.astype(np.float32).astype(np.float64)
    return total.astype(np.float32)


def reverse_dot(a: Float64Array, b: Float64Array, c: Float32Array) -> Float32Array:
    """`forward_dot`, last key first."""
    return forward_dot(a[:, ::-1], b[::-1], c)
