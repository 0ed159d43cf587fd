"""The exact softmax of one sequence and the sizes that its errors are multiples of."""

from __future__ import annotations

import math
from bisect import bisect_right as bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from references.rounding import Format

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# Numbers of keys or values that are worked on at once, so that what is made of them stays in a cache.
NUMBERS_AT_ONCE = 1 << 16
# Up to so many queries a product of keys with queries is faster than one of queries with keys.
FEW_ROWS = 12


@dataclass(frozen=True)
class Piece:
    """Some keys of some heads of several sequences.

    Attributes:
        heads: kv heads.
        keys: in ``Sequences.key`` and ``value``.
        sequences: to which these keys belong.
        parts: of each of them its rows, its keys counted in the piece, and its keys counted in the sequence.
    """

    heads: slice
    keys: slice
    sequences: slice
    parts: list[tuple[slice, slice, slice]]


# Makes an array of another one and of room for it: a function of NumPy and its argument ``out``.
Make = Callable[[Float64Array, Float64Array], Float64Array]


@dataclass(frozen=True)
class Sequences:
    """Several sequences as one array each: the rows of all, one after the other, and as many keys as the longest has.

    A row is a query of one of the group_size query heads of a kv head.

    Attributes:
        query: [num_kv_heads, rows, head_dim]
        key, value: [num_kv_heads, keys of all sequences, head_dim]
        rows: of each sequence.
        keys: of each sequence, in ``key`` and ``value``.
        visible: [rows, kv_len] of each sequence.
    """

    query: Float64Array
    key: Float64Array
    value: Float64Array
    rows: list[slice]
    keys: list[slice]
    visible: list[BoolArray]

    @cached_property
    def kv_len(self) -> int:
        """Keys of the longest sequence."""
        return max(int(keys.stop) - int(keys.start) for keys in self.keys)

    @cached_property
    def hidden(self) -> BoolArray | None:
        """[rows, kv_len]: which keys a row does not see; None if every row sees every key."""
        if len(self.visible) == 1:
            return None if self.visible[0].all() else ~self.visible[0]
        hidden = np.ones((self.query.shape[1], self.kv_len), dtype=np.bool_)
        for rows, visible in zip(self.rows, self.visible, strict=True):
            np.logical_not(visible, out=hidden[rows, : visible.shape[1]])
        return hidden if hidden.any() else None

    @cached_property
    def pieces(self) -> list[Piece]:
        """All keys of all heads at once if they are few, else ranges of the keys of one head after the other."""
        num_kv_heads, keys, head_dim = self.key.shape
        if self.key.size <= NUMBERS_AT_ONCE:
            return [self._piece(slice(0, num_kv_heads), slice(0, keys))]
        length = max(1, NUMBERS_AT_ONCE // head_dim)
        return [
            self._piece(slice(head, head + 1), slice(start, min(start + length, keys)))
            for head in range(num_kv_heads)
            for start in range(0, keys, length)
        ]

    def _piece(self, heads: slice, keys: slice) -> Piece:
        first, last = (bisect(self._ends, at) for at in (keys.start, keys.stop - 1))
        parts = []
        for rows, its_keys in zip(self.rows[first : last + 1], self.keys[first : last + 1], strict=True):
            start, stop = max(its_keys.start, keys.start), min(its_keys.stop, keys.stop)
            in_piece = slice(start - keys.start, stop - keys.start)
            parts.append((rows, in_piece, slice(start - its_keys.start, stop - its_keys.start)))
        return Piece(heads, keys, slice(first, last + 1), parts)

    @cached_property
    def _ends(self) -> list[int]:
        return [keys.stop for keys in self.keys]

    def _room(self) -> Float64Array:
        """For what is made of a piece."""
        return np.empty(max(self.key.shape[-1], min(NUMBERS_AT_ONCE, self.key.size)))

    def scores(self, *wanted: tuple[Float64Array, Make | None]) -> list[Float64Array]:
        """query . key, [num_kv_heads, rows, kv_len]; 0 beyond the keys of a sequence.

        Args:
            wanted: queries, and what to make of the keys before they meet them; None: nothing. Everything that is
                wanted is taken of a piece of the keys while it is in a cache.
        """
        new = np.empty if len(self.rows) == 1 else np.zeros
        results = [new((*query.shape[:2], self.kv_len)) for query, _ in wanted]
        few = self.query.shape[1] <= FEW_ROWS
        turned_queries = [np.ascontiguousarray(query.swapaxes(-1, -2)) if few else query for query, _ in wanted]
        room = self._room()
        for piece in self.pieces:
            key = self.key[piece.heads, piece.keys]
            for (query, make), turned, result in zip(wanted, turned_queries, results, strict=True):
                made = key if make is None else make(key, room[: key.size].reshape(key.shape))
                for rows, keys, columns in piece.parts:
                    its_result = result[piece.heads, rows, columns]
                    if few:
                        its_result[...] = (made[:, keys] @ turned[piece.heads, :, rows]).swapaxes(-1, -2)
                    else:
                        np.matmul(query[piece.heads, rows], made[:, keys].swapaxes(-1, -2), out=its_result)
        return results

    def sums(self, *wanted: tuple[Make | None, list[Float64Array | None]]) -> list[list[Float64Array]]:
        """Weighted sums over keys, [num_kv_heads, rows, head_dim] each.

        Args:
            wanted: what to make of the values, as for ``scores``, and weights [num_kv_heads, rows, kv_len] of what was
                made. None: the sum over all keys, [num_kv_heads, sequences, head_dim].
        """
        of_sequences = (len(self.value), len(self.rows), self.value.shape[-1])
        results = [
            [np.zeros(of_sequences) if weight is None else np.empty(self.query.shape) for weight in weights]
            for _, weights in wanted
        ]
        room = self._room()
        for piece in self.pieces:
            value = self.value[piece.heads, piece.keys]
            for (make, weights), of_weights in zip(wanted, results, strict=True):
                if not weights:
                    continue
                made = value if make is None else make(value, room[: value.size].reshape(value.shape))
                for sequence, (rows, keys, columns) in enumerate(piece.parts, piece.sequences.start):
                    mine = made[:, keys]
                    for weight, result in zip(weights, of_weights, strict=True):
                        if weight is None:  # faster than to add up
                            result[piece.heads, sequence] += (np.ones((1, mine.shape[-2])) @ mine)[..., 0, :]
                        elif columns.start == 0:
                            np.matmul(weight[piece.heads, rows, columns], mine, out=result[piece.heads, rows])
                        else:
                            result[piece.heads, rows] += weight[piece.heads, rows, columns] @ mine
        return results

    @cached_property
    def sizes(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Of every sequence: first row, rows, first key, keys."""
        spans = [
            (r.start, r.stop - r.start, k.start, k.stop - k.start) for r, k in zip(self.rows, self.keys, strict=True)
        ]
        first_row, rows, first_key, keys = np.array(spans).T
        return first_row, rows, first_key, keys

    @cached_property
    def first_key(self) -> IntArray:
        """[rows]: where in ``key`` the keys of the sequence of each row begin."""
        return np.repeat(self.sizes[2], self.sizes[1])

    def times(self, of_sequences: Float64Array, of_rows: Float64Array) -> Float64Array:
        """[num_kv_heads, sequences, columns] times [num_kv_heads, rows]: [num_kv_heads, rows, columns]."""
        if len(self.rows) == 1:
            return of_sequences * of_rows[..., None]
        result = np.empty((*of_rows.shape, of_sequences.shape[-1]))
        for sequence, rows in enumerate(self.rows):
            np.multiply(of_sequences[:, sequence, None], of_rows[:, rows, None], out=result[:, rows])
        return result


@dataclass(frozen=True)
class Softmax:
    """Logits in base 2 and their weights; [num_kv_heads, rows, kv_len] unless said otherwise.

    Hidden keys have power and gap 0.
    """

    hidden: BoolArray | None  # [rows, kv_len]; None: every row sees every key
    blind: BoolArray | None  # [rows] which see no key; None: there is none
    logit: Float64Array  # -inf where hidden
    gap: Float64Array  # logit less the largest one, in octaves: never above 0
    largest_gap: float
    peak: Float64Array  # [num_kv_heads, rows] largest logit, 0 without keys
    power: Float64Array  # 2**gap
    total: Float64Array  # [num_kv_heads, rows] sum of the powers, 1 without keys

    def weight(self) -> Float64Array:
        """What the powers are of their total."""
        return self.power / self.total[..., None]


def lifted_magnitude(magnitude: Float64Array, fmt: Format, fused: bool) -> Float64Array:
    """Magnitudes as a tensor core aligns them: subnormal numbers count as the smallest normal one."""
    if not fused or magnitude.min(initial=np.inf) >= fmt.smallest_normal:
        return magnitude
    return np.where(magnitude > 0, np.maximum(magnitude, fmt.smallest_normal), 0.0)


def softmax_of(sequences: Sequences, logit: Float64Array) -> Softmax:
    """The softmax of finite logits in base 2, of which those of hidden keys are overwritten."""
    hidden = sequences.hidden
    blind: BoolArray | None = None
    if hidden is not None:
        np.copyto(logit, -np.inf, where=hidden)
        sees_none: BoolArray = np.asarray(hidden.all(axis=-1))
        blind = sees_none if sees_none.any() else None
    peak = np.maximum.reduce(logit, axis=-1)
    if blind is not None:
        peak[:, blind] = 0.0
    gap = logit - peak[..., None]
    if hidden is not None:  # exp2 of what underflows is several times as slow
        np.copyto(gap, 0.0, where=hidden)
    power = np.exp2(gap)
    if hidden is not None:
        np.copyto(power, 0.0, where=hidden)
    total = np.add.reduce(power, axis=-1)
    if blind is not None:
        total[:, blind] = 1.0
    return Softmax(hidden, blind, logit, gap, -float(np.minimum.reduce(gap, axis=None)), peak, power, total)
