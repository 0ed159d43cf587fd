"""The exact lattice: attention whose every intermediate is exactly representable, so its result is bits.

Inputs. With ``scale = lattice_scale(j) = fp32(ln 2) * 2**-j`` the folded constant ``scale * log2(e)`` of a
kernel is exactly ``2**-j``; queries are ``2**j`` times small integers and keys small integers, so the base-2
logits t are integers. Values are integers. A kernel's weights are then powers of two.

Conditions, for every query over the keys it may see (any subset of n keys):

    C1  max t - min t <= R                         every weight is 2**-k, 0 <= k <= R
    C2  n * max(1, max|v|) * 2**R <= 2**24         sums of weights and of weight * value fit float32
    C3  sum_d |q_d| |k_jd| < 2**24                 score products and their sums fit float32
    C4  q, k, v representable in the input format, R <= 14: no weight is subnormal in float16

All intermediates before the division are then integer multiples of ``2**-R`` below ``2**24`` multiples, which
float32 adds without rounding in any order, in any tiling, split and merge by (acc, m, l), and which tensor
cores align without loss as long as they keep F >= 23 bits. C1..C3 are about counts and ranges only, so they
hold for every causal prefix, every split and every tile once they hold for all keys.

The device must be exact in three places: ``exp2(-k) = 2**-k`` for 0 <= k <= R; ``log2(2**k) = k``, for lse;
x / 2**k, for the outputs whose weights sum to a power of two. `python -m properties probe` measures them, and
they hold on the H200 and in the interpreter.

The output is then ``fl_out(fl32(A / l))`` with A and l exact. Where l is not a power of two, a division that
is not correctly rounded (CUDA's div.full.f32, up to 2 ulp; on the H200 even 33 / 33 is not 1) may change bits
if A / l lies that close to a rounding boundary of the output: `LatticeResult.division_sensitive` says where.
Few float16 and bfloat16 outputs do, most float32 ones. `lattice_inputs.power_of_two_from_draws` builds inputs
whose weights sum to a power of two for every query, so that nothing is sensitive.

Blind spots: powers of two survive narrow formats for P, so the lattice cannot see how P is rounded or how
precise exp2 is between integers; the budget and the calibrated noise see those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from references.rounding import BitsArray, Format, as_format, encode, round_to

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]

FLOAT32_LN2 = float(np.float32(math.log(2.0)))
SIGNIFICAND = 24  # bits of a float32 significand
LARGEST_RANGE = 14  # a weight of 2**-14 is the smallest normal float16


def lattice_scale(scale_exponent: int = 0) -> float:
    """The float32 scale s for which ``fl32(s * log2 e) == 2**-scale_exponent`` exactly.

    It holds whether log2(e) is float32 or float64: the product misses the power of two by 1.1e-8 or 2.7e-9,
    less than the half spacing 3.0e-8 below it.
    """
    return FLOAT32_LN2 * 2.0**-scale_exponent


@dataclass(frozen=True)
class LatticeResult:
    """The one right answer of a lattice problem.

    Attributes:
        out_bits: [num_q_heads, q_len, head_dim] bit patterns; 0 where a query sees no key.
        lse: [num_q_heads, q_len] natural log: where `lse_is_exact`, the float32 a kernel computes as
            ``fl32((m + log2 l) * fl32(ln 2))``; elsewhere the real number, to float64's precision, to be
            compared within the budget. -inf where a query sees no key.
        lse_is_exact: l is a power of two, so log2 l is an integer.
        division_sensitive: an error of the division within the bound given could change the output's bits.
    """

    out_bits: BitsArray
    lse: Float64Array
    lse_is_exact: NDArray[np.bool_]
    division_sensitive: NDArray[np.bool_]


def exact_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    visible: NDArray[np.bool_],
    scale_exponent: int,
    fmt: Format | str,
) -> tuple[BitsArray, Float64Array]:
    """(out bits, lse) of `solve`, for comparison with a kernel whose division is correctly rounded."""
    result = solve(query, key, value, visible, scale_exponent=scale_exponent, fmt=fmt)
    return result.out_bits, result.lse


def solve(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    visible: NDArray[np.bool_],
    *,
    scale_exponent: int,
    fmt: Format | str,
    division_error: float = 2.5 * 2.0**-23,
) -> LatticeResult:
    """Attend in integers: A and l as multiples of the smallest weight, one division, one rounding.

    Args:
        query: [num_q_heads, q_len, head_dim] integers (of any numeric dtype).
        key, value: [num_kv_heads, kv_len, head_dim] integers.
        visible: [q_len, kv_len].
        scale_exponent: j; the scale is `lattice_scale(j)`.
        fmt: the output format.
        division_error: relative error of the device's division, for `division_sensitive`.

    Raises:
        ValueError: a condition C1..C4 does not hold for these inputs; the message names it.
    """
    fmt = as_format(fmt)
    q, k, v = _integers("query", query), _integers("key", key), _integers("value", value)
    _check_operands(q, k, v, fmt)
    num_q_heads, q_len, _ = q.shape
    group_size = num_q_heads // k.shape[0]
    numerator = np.zeros(q.shape, np.int64)
    row_sum = np.zeros((num_q_heads, q_len), np.int64)
    lowest = np.zeros((num_q_heads, q_len), np.int64)
    for head in range(num_q_heads):
        z = q[head] @ k[head // group_size].T  # [q_len, kv_len]
        if np.any(np.where(visible, z, 0) % (1 << scale_exponent)):
            raise ValueError(f"query . key must be a multiple of 2**{scale_exponent} for every visible key")
        t = z >> scale_exponent
        if not t.size:
            continue
        top = np.where(visible, t, np.iinfo(np.int64).min).max(axis=1)
        bottom = np.where(visible, t, np.iinfo(np.int64).max).min(axis=1)
        lowest[head] = np.where(visible.any(axis=1), bottom, 0)
        spread = np.where(visible.any(axis=1), top - lowest[head], 0)
        if spread.max(initial=0) > LARGEST_RANGE:
            raise ValueError(f"C1: logits must spread over at most {LARGEST_RANGE}, got {spread.max()}")
        weight = np.where(visible, 1 << np.where(visible, t - lowest[head][:, None], 0), 0)
        row_sum[head] = weight.sum(axis=1)
        numerator[head] = weight @ v[head // group_size]
        # The sums are in units of 2**-spread of the largest weight: C2, tighter, from the data.
        largest = np.maximum(row_sum[head], (weight @ np.abs(v[head // group_size])).max(axis=1, initial=0))
        if largest.max(initial=0) > 1 << SIGNIFICAND:
            raise ValueError(f"C2: sums must not exceed 2**{SIGNIFICAND} smallest weights, got {largest.max()}")

    sees = row_sum > 0
    # Both are integers of at most 24 bits: float64 division, rounded once more to float32, is the correctly
    # rounded float32 quotient (53 >= 2 * 24 + 2 bits).
    quotient = numerator / np.where(sees, row_sum, 1)[:, :, None]
    rounded = quotient.astype(np.float32).astype(np.float64)
    out_bits = encode(rounded, fmt)
    is_power = sees & (row_sum & (row_sum - 1) == 0)
    sensitive = np.zeros(q.shape, bool)
    for direction in (-1, 1):
        moved = (quotient * (1 + direction * division_error)).astype(np.float32)
        sensitive |= encode(moved.astype(np.float64), fmt) != out_bits
    sensitive &= ~is_power[:, :, None]

    lse_log2 = lowest + np.log2(np.where(sees, row_sum, 1))
    exact = (lse_log2.astype(np.float32) * np.float32(FLOAT32_LN2)).astype(np.float64)
    lse = np.where(is_power, exact, lse_log2 * math.log(2.0))
    return LatticeResult(out_bits, np.where(sees, lse, -np.inf), is_power, sensitive)


def _integers(name: str, values: ArrayLike) -> Int64Array:
    array = np.asarray(values)
    integers = array.astype(np.int64)
    if not np.array_equal(integers, array):
        raise ValueError(f"{name} must hold integers")
    return integers


def _check_operands(q: Int64Array, k: Int64Array, v: Int64Array, fmt: Format) -> None:
    integer_limit = 1 << min(fmt.precision, 11)
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not np.array_equal(round_to(x, fmt), x):
            raise ValueError(f"C4: {name} must be representable in {fmt.name}, got up to {np.abs(x).max()}")
    if np.abs(v).max(initial=0) > integer_limit:
        raise ValueError(f"C4: |value| must not exceed {integer_limit}, got {np.abs(v).max()}")
    products = np.abs(q).sum(axis=2).max(initial=0) * np.abs(k).max(initial=0)
    if products >= 1 << SIGNIFICAND:
        raise ValueError(f"C3: |query| . |key| must be below 2**{SIGNIFICAND}, got up to {products}")
