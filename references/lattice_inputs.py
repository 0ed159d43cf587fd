"""Lattice inputs of any shape from integer draws: the builder beside the oracle of `references.lattice`.

No random numbers of its own: draws in [0, 2**16) come from the caller's generator, one for every element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from references.lattice import SIGNIFICAND, lattice_scale
from references.rounding import BitsArray, Format, encode

Int64Array = NDArray[np.int64]

MAX_RANGE = 12
DEFAULT_MAX_VALUE = 16
LARGEST_DRAW = 1 << 16


def weight_range(max_keys: int, max_value: int = DEFAULT_MAX_VALUE) -> int:
    """The largest R <= 12 that C2 allows for `max_keys` keys; raises if even R = 0 does not fit."""
    bits = (max(1, max_keys) * max(1, max_value) - 1).bit_length()
    if bits > SIGNIFICAND:
        raise ValueError(f"max_keys * max_value must not exceed 2**{SIGNIFICAND}, got {max_keys} * {max_value}")
    return min(MAX_RANGE, SIGNIFICAND - bits)


@dataclass(frozen=True)
class Lattice:
    """Integer inputs of one sequence, and the range R their logits keep within.

    query [num_q_heads, q_len, head_dim] is already multiplied by 2**scale_exponent.
    """

    query: Int64Array
    key: Int64Array
    value: Int64Array
    scale_exponent: int
    weight_range: int

    @property
    def scale(self) -> float:
        """The scale to pass to the kernel."""
        return lattice_scale(self.scale_exponent)

    def bits(self, fmt: Format | str) -> tuple[BitsArray, ...]:
        """(query, key, value) as bit patterns of `fmt`; exact by C4."""
        return tuple(encode(x.astype(np.float64), fmt) for x in (self.query, self.key, self.value))


def key_span(head_dim: int, exponent_range: int) -> tuple[int, int]:
    """(dims a query uses, span of a key's elements), chosen so that used * span <= exponent_range."""
    used = max(1, min(head_dim, exponent_range))
    return used, exponent_range // used


def query_from_draws(draws: ArrayLike, *, exponent_range: int, scale_exponent: int = 0) -> Int64Array:
    """Queries [..., head_dim] with entries 0 or +-2**scale_exponent.

    The dimensions with the smallest draws are used, as many as the range allows; the draw's lowest bit is the
    sign. Over the queries of a case every dimension is used, so a lost tail of head_dim shows.
    """
    draw = _checked(draws)
    used, _ = key_span(draw.shape[-1], exponent_range)
    # High bits rank, so that the sign (the lowest bit) is independent of the choice.
    rank = np.argsort(np.argsort(draw >> 1, axis=-1, kind="stable"), axis=-1, kind="stable")
    sign = 1 - 2 * (draw & 1)
    return np.where(rank < used, sign, 0) << scale_exponent


def key_from_draws(draws: ArrayLike, *, exponent_range: int, key_offset: int = 0) -> Int64Array:
    """Keys [..., head_dim] with entries key_offset .. key_offset + span, element by element."""
    draw = _checked(draws)
    _, span = key_span(draw.shape[-1], exponent_range)
    return draw % (span + 1) + key_offset


def value_from_draws(draws: ArrayLike, *, max_value: int = DEFAULT_MAX_VALUE) -> Int64Array:
    """Values [...] in -max_value..max_value, element by element."""
    return _checked(draws) % (2 * max_value + 1) - max_value


def from_draws(
    query_draws: ArrayLike,
    key_draws: ArrayLike,
    value_draws: ArrayLike,
    *,
    scale_exponent: int = 0,
    max_value: int = DEFAULT_MAX_VALUE,
    exponent_range: int | None = None,
    key_offset: int = 0,
) -> Lattice:
    """A lattice of any shape from integers drawn in [0, 2**16).

    Args:
        query_draws: [num_q_heads, q_len, head_dim]
        key_draws: [num_kv_heads, kv_len, head_dim]
        value_draws: [num_kv_heads, kv_len, head_dim]
        scale_exponent: j; queries are multiplied by 2**j and the scale divided by it.
        max_value: largest |value|.
        exponent_range: R; default the largest that C2 allows for kv_len. Give it explicitly when the same
            draws are to mean the same data at another kv_len: every element of key and value depends on its
            own draw, R, head_dim and max_value only, a query on its own row of draws.
        key_offset: added to every key element. It shifts all logits of a query by the offset times the sum of
            its signs and leaves the weights alone: with 64, hundreds of octaves either way, beyond the range
            of exp2 for a kernel that forgets to subtract the maximum.

    Raises:
        ValueError: a draw outside [0, 2**16), or an R that breaks C2.
    """
    kv_len = np.asarray(key_draws).shape[-2]
    allowed = weight_range(kv_len, max_value)
    chosen = allowed if exponent_range is None else exponent_range
    if not 0 <= chosen <= allowed:
        raise ValueError(f"exponent_range must be between 0 and {allowed} for {kv_len} keys, got {chosen}")
    return Lattice(
        query=query_from_draws(query_draws, exponent_range=chosen, scale_exponent=scale_exponent),
        key=key_from_draws(key_draws, exponent_range=chosen, key_offset=key_offset),
        value=value_from_draws(value_draws, max_value=max_value),
        scale_exponent=scale_exponent,
        weight_range=chosen,
    )


def power_of_two_exponents(count: int, exponent_range: int) -> Int64Array:
    """`count` exponents in [-R, 0] whose powers of two sum to a power of two.

    Start from S ones, S a power of two, and split: 1 -> 1/2 + 1/2, one half -> 1/4 + 1/4, ... down to 2**-R,
    one chain after the other. Splitting keeps the sum and adds one key.

    Raises:
        ValueError: no such multiset; only if R = 0 and count is not a power of two.
    """
    if count == 0:
        return np.zeros(0, np.int64)
    ones = 1 << max(0, math.ceil(math.log2(count / (exponent_range + 1))))
    if ones > count:
        raise ValueError(f"count must be a power of two when exponent_range=0, got {count}")
    missing = count - ones
    exponents: list[int] = []
    for _ in range(ones):
        depth = min(exponent_range, missing)
        missing -= depth
        exponents += [*range(-1, -depth - 1, -1), -depth]
    return np.array(exponents, np.int64)


def power_of_two_from_draws(
    query_draws: ArrayLike,
    key_draws: ArrayLike,
    value_draws: ArrayLike,
    *,
    visible_counts: ArrayLike,
    scale_exponent: int = 0,
    max_value: int = DEFAULT_MAX_VALUE,
) -> Lattice:
    """A lattice whose weights sum to a power of two for every query, so that no division rounds.

    A query is one-hot. Column d of the keys holds, in its first n slots, a permutation (by draw) of
    `power_of_two_exponents(n)`, where n is the number of keys seen by the queries that use column d; the
    queries of one n share the columns ``index(n), index(n) + distinct, ...``.

    Args:
        query_draws, key_draws, value_draws: as for `from_draws`.
        visible_counts: [q_len]; query i sees the keys [0, visible_counts[i]).
        scale_exponent: as for `from_draws`.
        max_value: as for `from_draws`.

    Raises:
        ValueError: more distinct counts than head_dim (each needs a column of its own).
    """
    query_draw, key_draw = _checked(query_draws), _checked(key_draws)
    num_kv_heads, kv_len, head_dim = key_draw.shape
    counts = np.asarray(visible_counts, np.int64)
    distinct = np.unique(counts)
    if len(distinct) > head_dim:
        raise ValueError(f"visible_counts must have at most head_dim={head_dim} distinct values, got {len(distinct)}")
    chosen = weight_range(kv_len, max_value)
    key = -(key_draw % (chosen + 1))
    for d in range(head_dim):
        n = int(distinct[d % len(distinct)])
        exponents = power_of_two_exponents(n, chosen)
        for head in range(num_kv_heads):
            key[head, np.argsort(key_draw[head, :n, d], kind="stable"), d] = exponents

    # Columns that serve count number c are c, c + len(distinct), ...: pick one by draw.
    index = np.searchsorted(distinct, counts)  # [q_len]
    choices = (head_dim - index + len(distinct) - 1) // len(distinct)
    column = index + len(distinct) * (query_draw[:, :, 0] % choices)  # [num_q_heads, q_len]
    query = (np.arange(head_dim) == column[:, :, None]).astype(np.int64) << scale_exponent
    return Lattice(query, key, value_from_draws(value_draws, max_value=max_value), scale_exponent, chosen)


def _checked(draws: ArrayLike) -> Int64Array:
    array = np.asarray(draws)
    if array.dtype.kind not in "iu":
        raise TypeError(f"draws must be integers, got {array.dtype}")
    array = array.astype(np.int64)
    if array.size and not (array.min() >= 0 and array.max() < LARGEST_DRAW):
        raise ValueError(f"draws must lie in [0, {LARGEST_DRAW}), got {array.min()}..{array.max()}")
    return array
