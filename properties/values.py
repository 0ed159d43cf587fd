"""The numbers of a case: integer-only counters, the same bits on every machine.

An element depends on (seed, uid, tensor, token, head, dim) and nothing else, where token = (position in the
sequence, branch): removing a row, a head or a step changes no other number, and cutting the same tokens into
other steps changes none at all. No random stream, no libm: 64-bit counters are mixed and turned into
float64 by exact operations, then rounded once to the case's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from properties.case import TENSORS, Case
from references.lattice import lattice_scale
from references.lattice_inputs import key_from_draws, query_from_draws, value_from_draws
from references.rounding import BitsArray, as_format, encode, round_to

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]

# The lattice's conditions hold for up to 2**24 / (2**8 * 8) = 8192 visible keys; see references/lattice.py.
LATTICE_RANGE = 8
LATTICE_MAX_VALUE = 8

# ln(0.5 * (1 + 1.06 * u)) of each format, cut in two parts that are exact in it: a key with this logit below
# the peak has a weight just past the midpoint between two values of the format, so all roundings of P agree.
_COHERENT_LOGIT = {
    "float32": ("-0x1.62e42ep-1", "0x1.78a58ep-28"),
    "float16": ("-0x1.62cp-1", "0x1.fa4p-13"),
    "bfloat16": ("-0x1.6p-1", "-0x1.8ep-10"),
}


def tokens(case: Case, tensor: str, position: Int64Array, branch: Int64Array) -> BitsArray:
    """The bit patterns of some tokens of every row.

    Args:
        case: says seed, family, heads, head_dim and dtype.
        tensor: "query", "key" or "value".
        position: [batch, count], index of each token in its sequence (negative for queries before key 0).
        branch: [batch, count], how many forks and roll-backs lie behind the token.

    Returns:
        [batch, heads, count, head_dim], uint16 or uint32.
    """
    fmt = as_format(case.dtype)
    grid = Grid.of(case, tensor, position, branch)
    shape = (len(position), grid.head.size, position.shape[1], case.head_dim)
    exact = np.broadcast_to(FAMILY_OF[case.values](grid), shape)
    if tensor == "query" and case.gain:
        exact = np.ldexp(exact, case.gain)
    bits = encode(np.clip(exact, -fmt.max_finite, fmt.max_finite), fmt)
    for patch in case.patches:
        if patch.tensor == tensor:
            here = position[patch.row] == patch.token
            bits[patch.row, patch.head, here, patch.dim] = encode(patch.number, fmt)
    return bits


@dataclass(frozen=True)
class Grid:
    """Coordinates of the elements to make, shaped to broadcast to [batch, heads, count, head_dim].

    Attributes:
        case: the case.
        tensor: index into TENSORS.
        uid: [batch, 1, 1, 1]
        position, branch: [batch, 1, count, 1]
        head: [1, heads, 1, 1]; for key and value the first of the heads that hold the same numbers.
        dim: [1, 1, 1, head_dim]
    """

    case: Case
    tensor: int
    uid: Int64Array
    position: Int64Array
    branch: Int64Array
    head: Int64Array
    dim: Int64Array

    @staticmethod
    def of(case: Case, tensor: str, position: Int64Array, branch: Int64Array) -> Grid:
        """The grid of some tokens of every row."""
        is_query = tensor == "query"
        head = np.arange(case.num_q_heads if is_query else case.num_kv_heads)
        return Grid(
            case,
            TENSORS.index(tensor),
            np.array([row.uid for row in case.rows], np.int64)[:, None, None, None],
            position[:, None, :, None],
            branch[:, None, :, None],
            (head if is_query else head // case.kv_head_copies)[None, :, None, None],
            np.arange(case.head_dim)[None, None, None, :],
        )

    @property
    def name(self) -> str:
        """The tensor's name."""
        return TENSORS[self.tensor]

    def counters(self, salt: int = 0) -> UInt64Array:
        """64 well-mixed bits for every element; another salt gives independent ones."""
        start = _GOLDEN * (self.case.seed * 64 + salt * 4 + self.tensor + 1) & _MASK
        mixed = _mix(np.full((1, 1, 1, 1), start, np.uint64))
        for coordinate in (self.uid, self.position + _POSITION_OFFSET, self.branch, self.head, self.dim):
            mixed = _mix(mixed + (coordinate.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
        return mixed

    def below(self, bound: int, salt: int = 0) -> Int64Array:
        """Integers of [0, bound), bound at most 2**16."""
        return ((self.counters(salt) >> np.uint64(48)) % np.uint64(bound)).astype(np.int64)

    def normal(self, salt: int = 0) -> Float64Array:
        """Sums of four uniforms (Irwin-Hall), exact multiples of 7 * 2**-18, standard deviation 1.01."""
        bits = self.counters(salt)
        total = sum((bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
        centred = np.asarray(total, np.uint64).astype(np.int64) - 2 * 0xFFFF
        return centred * np.float64(0.875 * 2.0**-15)

    def without_token(self) -> Grid:
        """The same for every token of a row."""
        return replace(self, position=np.zeros_like(self.position), branch=np.zeros_like(self.branch))

    def without_row_and_token(self) -> Grid:
        """The same for every token of every row."""
        return replace(self.without_token(), uid=np.zeros_like(self.uid))

    def only_dim(self, d: int) -> Grid:
        """One number a token and head, whatever the dim."""
        return replace(self, dim=np.full((1, 1, 1, 1), d))


_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_POSITION_OFFSET = 1 << 32  # queries of op "attention" may stand before key 0


def _mix(x: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64Array = x ^ (x >> np.uint64(31))
    return mixed


def _half_octaves(head_dim: int) -> int:
    """The least h with 2**h >= sqrt(head_dim): undoes the default scale to within a factor of 2."""
    return ((head_dim - 1).bit_length() + 1) // 2


def _zeros(_: Grid) -> Float64Array:
    """Equal logits and nothing to add: only the LSE, which counts the keys, can be wrong."""
    return np.zeros((1, 1, 1, 1))


def _ones(_: Grid) -> Float64Array:
    """Every output is 1, every logit head_dim * scale."""
    return np.ones((1, 1, 1, 1))


def _iota(grid: Grid) -> Float64Array:
    """Coordinates: each element tells where it came from."""
    place = grid.position + grid.head + grid.dim
    if grid.name == "query":
        return np.where(grid.dim == (grid.position + grid.head) % grid.case.head_dim, 1.0, 0.0)
    if grid.name == "key":
        return (place % 5 - 2).astype(np.float64)
    return ((place + 2 * grid.position + 4 * grid.head + 7 * grid.branch) % 17 - 8).astype(np.float64)


def _integers(grid: Grid) -> Float64Array:
    """Small integers, exact in every format."""
    if grid.name == "value":
        return (grid.below(17) - 8).astype(np.float64)
    return (grid.below(5) - 2).astype(np.float64)


def _lattice(grid: Grid) -> Float64Array:
    """Every intermediate is exact when the scale is a lattice scale: see references/lattice.py."""
    draws = grid.below(1 << 16)
    if grid.name == "query":
        j = lattice_exponent(grid.case.scale)
        return query_from_draws(draws, exponent_range=LATTICE_RANGE, scale_exponent=j).astype(np.float64)
    if grid.name == "key":
        return key_from_draws(draws, exponent_range=LATTICE_RANGE).astype(np.float64)
    return value_from_draws(draws, max_value=LATTICE_MAX_VALUE).astype(np.float64)


def lattice_exponent(scale: float | None) -> int:
    """The j whose lattice scale this is; 0 for any other scale, which leaves the lattice's inputs inexact."""
    return next((j for j in range(LATTICE_EXPONENTS) if lattice_scale(j) == scale), 0)


LATTICE_EXPONENTS = 4


def _one_hot(grid: Grid) -> Float64Array:
    """Each query wants one key; its neighbour, the decoy, agrees with it in all dims but a quarter."""
    if grid.name == "value":
        return grid.normal()
    # For an even D = 2**2h, target and decoy logits are 64 and 32.
    magnitude = 2.0 ** (6 - _half_octaves(grid.case.head_dim))
    if grid.name == "key":
        return _code(grid)
    newest = np.maximum(grid.position, 0)
    any_key = (grid.only_dim(0).counters(1) % (newest + 1).astype(np.uint64)).astype(np.int64)
    choice = grid.only_dim(0).below(4)
    target = np.select(
        [choice == 0, choice == 1, choice == 2], [newest, 0 * newest, np.maximum(newest - 1, 0)], any_key
    )
    kv_head = grid.head // grid.case.group_size // grid.case.kv_head_copies
    return magnitude * _code(replace(grid, tensor=TENSORS.index("key"), position=target, head=kv_head))


def _code(grid: Grid) -> Float64Array:
    """Signs, the same for both keys of a pair of positions but in every fourth dim of the odd one."""
    pair = replace(grid, position=grid.position // 2, branch=np.zeros_like(grid.branch))
    signs = 1.0 - 2.0 * pair.below(2)
    return np.where((grid.position % 2 == 1) & (grid.dim % 4 == 0), -signs, signs)


def _normal(grid: Grid) -> Float64Array:
    """What everybody tests."""
    return grid.normal()


def _constant_values(grid: Grid) -> Float64Array:
    """Values do not depend on the token: they must come back, whatever the weights."""
    return (grid.without_row_and_token() if grid.name == "value" else grid).normal()


def _with_offset(grid: Grid, query: float, key: ArrayLike) -> Float64Array:
    """Normal data whose dim 0 adds query * key to every score."""
    if grid.name == "value":
        return grid.normal()
    return np.where(grid.dim == 0, query if grid.name == "query" else key, grid.normal())


def _negative_logits(grid: Grid) -> Float64Array:
    """All logits near -2**14: a key hidden by a zero or a finite sentinel outweighs every real one."""
    return _with_offset(grid, 2.0**7, -(2.0 ** (7 + _half_octaves(grid.case.head_dim))))


def _large_logits(grid: Grid) -> Float64Array:
    """Logits of 128 (odd tokens) and 256: exp overflows float32 beyond 88 unless the maximum goes first."""
    return _with_offset(grid, 2.0**4, 2.0 ** (4 + _half_octaves(grid.case.head_dim) - (grid.position % 2)))


def _score_range(grid: Grid) -> Float64Array:
    """Scores q.k of 2**17 before scaling, beyond float16's 65504; all inputs fit."""
    return _with_offset(grid, 2.0**8, 2.0**9)


def _rising(grid: Grid) -> Float64Array:
    """Each key beats the one before by about half a nat: the running maximum moves in every tile."""
    return _with_offset(grid, 2.0 ** (_half_octaves(grid.case.head_dim) - 1), grid.position.astype(np.float64))


def _falling(grid: Grid) -> Float64Array:
    """The first key wins: later tiles hardly count, and must not raise the maximum."""
    return _with_offset(grid, 2.0 ** (_half_octaves(grid.case.head_dim) - 1), -grid.position.astype(np.float64))


def _near_ties(grid: Grid) -> Float64Array:
    """Keys of a row differ in their last bit only."""
    if grid.name == "value":
        return grid.normal()
    if grid.name == "query":
        return 4.0 * grid.normal()
    fmt = as_format(grid.case.dtype)
    common = round_to(grid.without_token().normal(), fmt)
    return common * (1.0 + (grid.below(3, salt=1) - 1) * 2.0 ** (1 - fmt.precision))


def _dynamic_range(grid: Grid) -> Float64Array:
    """Magnitudes over 12 octaves in query and key, 20 in value."""
    octaves, lowest = (20, -12) if grid.name == "value" else (13, -8)
    return np.ldexp(grid.normal(), grid.below(octaves, salt=1) + lowest)


def _subnormal(grid: Grid) -> Float64Array:
    """Keys and values below the smallest normal number of the format."""
    fmt = as_format(grid.case.dtype)
    if grid.name == "query":
        return 64.0 * grid.normal()
    bits = min(fmt.precision - 1, 16)
    steps = (grid.below(1 << bits) << (fmt.precision - 1 - bits)) | 1  # odd, so never zero
    return np.where(grid.below(2, salt=1) == 0, steps, -steps) * fmt.smallest_subnormal


def _coherent(grid: Grid) -> Float64Array:
    """With scale 1: all weights but the first round up by nearly half a unit; no value cancels it."""
    if grid.name == "query":
        return (grid.dim < 2).astype(np.float64)
    first = grid.position == 0
    if grid.name == "value":
        return np.where(first, 0.0, 0.5 + np.abs(grid.normal()))
    high, low = (float.fromhex(part) for part in _COHERENT_LOGIT[grid.case.dtype])
    return np.where(first | (grid.dim > 1), 0.0, np.where(grid.dim == 0, high, low))


def _large_values(grid: Grid) -> Float64Array:
    """Values from half the largest finite number up to it, one sign a dim: P.V may overflow float32."""
    if grid.name != "value":
        return grid.normal()
    share = (grid.below(1 << 15) + (1 << 15) + 1) * 2.0**-16
    return share * (1.0 - 2.0 * (grid.dim % 2)) * as_format(grid.case.dtype).max_finite


FAMILY_OF: dict[str, Callable[[Grid], Float64Array]] = {
    "zeros": _zeros,
    "ones": _ones,
    "iota": _iota,
    "integers": _integers,
    "lattice": _lattice,
    "one_hot": _one_hot,
    "normal": _normal,
    "constant_values": _constant_values,
    "negative_logits": _negative_logits,
    "large_logits": _large_logits,
    "score_range": _score_range,
    "rising": _rising,
    "falling": _falling,
    "near_ties": _near_ties,
    "dynamic_range": _dynamic_range,
    "subnormal": _subnormal,
    "coherent": _coherent,
    "large_values": _large_values,
}
