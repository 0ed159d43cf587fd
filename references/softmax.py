"""The exact softmax of one sequence and the sizes that its errors are multiples of."""

from __future__ import annotations

import math
from bisect import bisect_right as bisect
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from references.pieces import NUMBERS_AT_ONCE, Make, Part, Piece, on_cache_line, scores_of_few, sums_of_one
from references.rounding import Format

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# Up to so many queries a product of keys with queries is faster than one of queries with keys.
FEW_ROWS = 12


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

    @property
    def has_few_rows(self) -> bool:
        """Whether a product with keys or values takes about as long as reading these."""
        return len(self.query[0]) <= FEW_ROWS

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
    def heads(self) -> list[slice] | range:
        """Which kv heads are worked on at once: all of them if their keys are few, else one after the other."""
        return [slice(None)] if self.key.size <= NUMBERS_AT_ONCE else range(len(self.key))

    @cached_property
    def pieces(self) -> list[Piece]:
        """Ranges of the keys, of the heads that are worked on at once."""
        _, num_keys, head_dim = self.key.shape
        if self.key.size <= NUMBERS_AT_ONCE:
            return [self._piece(0, num_keys, np.empty(self.key.shape))]
        length = max(1, NUMBERS_AT_ONCE // head_dim)
        room = on_cache_line((length, head_dim))
        return [self._piece(start, min(start + length, num_keys), room) for start in range(0, num_keys, length)]

    @property
    def is_one_in_pieces(self) -> bool:
        """Whether this is one sequence with many keys, which is all of every piece."""
        return len(self.rows) == 1 and len(self.pieces) > 1

    def _piece(self, start: int, stop: int, room: Float64Array) -> Piece:
        all_of_them, parts = slice(None), []
        for sequence in range(bisect(self._ends, start), bisect(self._ends, stop - 1) + 1):
            keys, rows = self.keys[sequence], self.rows[sequence] if len(self.rows) > 1 else all_of_them
            first, last = max(keys.start, start), min(keys.stop, stop)
            in_piece, columns = slice(first - start, last - start), slice(first - keys.start, last - keys.start)
            parts.append(
                Part(sequence, (..., in_piece, all_of_them), columns, (..., rows, all_of_them), (..., rows, columns))
            )
        return Piece((..., slice(start, stop), all_of_them), room[..., : stop - start, :], parts)

    @cached_property
    def _ends(self) -> list[int]:
        return [keys.stop for keys in self.keys]

    def scores(self, *wanted: tuple[Float64Array, Make | None]) -> list[Float64Array]:
        """query . key, [num_kv_heads, rows, kv_len]; 0 beyond the keys of a sequence.

        Args:
            wanted: queries, and what to make of the keys before they meet them; None: nothing. Everything that is
                wanted is taken of a piece of the keys while it is in a cache.
        """
        if self.is_one_in_pieces and self.has_few_rows:
            return scores_of_few(self.key, self.pieces, wanted)
        new = np.empty if len(self.rows) == 1 else np.zeros
        results = [new((*query.shape[:2], self.kv_len)) for query, _ in wanted]
        few = self.has_few_rows
        queries = [np.ascontiguousarray(query.mT).mT if few else query for query, _ in wanted]
        for heads in self.heads:
            its_keys = self.key[heads]
            of_heads = [
                (make, query[heads], result[heads])
                for (_, make), query, result in zip(wanted, queries, results, strict=True)
            ]
            for piece in self.pieces:
                key = its_keys[piece.keys]
                for make, query, result in of_heads:
                    made = key if make is None else make(key, piece.room)
                    for part in piece.parts:
                        if few:
                            result[part.scores] = (made[part.keys] @ query[part.rows].mT).mT
                        else:
                            np.matmul(query[part.rows], made[part.keys].mT, out=result[part.scores])
        return results

    def sums(self, *wanted: tuple[Make | None, list[Float64Array | None]]) -> list[list[Float64Array]]:
        """Weighted sums over keys, [num_kv_heads, rows, head_dim] each.

        Args:
            wanted: what to make of the values, as for ``scores``, and weights [num_kv_heads, rows, kv_len] of what was
                made; of a single sequence also those of several kinds, one below the other. None: the sum over all
                keys, [num_kv_heads, sequences, head_dim].
        """
        if self.is_one_in_pieces:
            return sums_of_one(self.value, self.pieces, wanted)
        num_kv_heads, _, head_dim = self.value.shape
        ones = np.ones(self.kv_len)

        def room(weight: Float64Array | None) -> Float64Array:
            if weight is None:
                return np.zeros((num_kv_heads, len(self.rows), head_dim))
            return np.empty((num_kv_heads, weight.shape[1], head_dim))

        sums = [(make, [(weight, room(weight)) for weight in weights]) for make, weights in wanted]
        for heads in self.heads:
            values = self.value[heads]
            of_heads = [
                (make, [(None if weight is None else weight[heads], result[heads]) for weight, result in pairs])
                for make, pairs in sums
            ]
            for piece in self.pieces:
                value = values[piece.keys]
                for make, pairs in of_heads:
                    made = value if make is None else make(value, piece.room)
                    for part in piece.parts:
                        mine = made[part.keys]
                        for weight, result in pairs:
                            if weight is None:  # faster than to add up
                                result[..., part.sequence, :] += ones[part.columns] @ mine
                            else:
                                its_weight, its_result = weight[part.scores], result[part.rows]
                                if part.columns.start == 0:
                                    np.matmul(its_weight, mine, out=its_result)
                                else:
                                    its_result += its_weight @ mine
        return [[result for _, result in pairs] for _, pairs in sums]

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
    widest: Float64Array  # [num_kv_heads, rows] the gap that is furthest below 0, without its sign
    peak: Float64Array  # [num_kv_heads, rows] largest logit, 0 without keys
    power: Float64Array  # 2**gap
    # Of few rows of one sequence [num_kv_heads, 2 * rows, kv_len], the powers and below them room for ``Shares``.
    stack: Float64Array | None
    total: Float64Array  # [num_kv_heads, rows] sum of the powers, 1 without keys

    def weight(self) -> Float64Array:
        """What the powers are of their total."""
        return self.power / self.total[..., None]


def lifted_magnitude(magnitude: Float64Array, fmt: Format, fused: bool) -> Float64Array:
    """Magnitudes as a tensor core aligns them: subnormal numbers count as the smallest normal one."""
    if not fused or magnitude.min(initial=np.inf) >= fmt.smallest_normal:
        return magnitude
    return np.where(magnitude == 0, 0.0, np.maximum(magnitude, fmt.smallest_normal))


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
    num_kv_heads, rows, kv_len = gap.shape
    is_stacked = len(sequences.rows) == 1 and sequences.has_few_rows
    stack = np.empty((num_kv_heads, 2 * rows, kv_len)) if is_stacked else None
    power = np.exp2(gap, out=None if stack is None else stack[:, :rows])
    if hidden is not None:
        np.copyto(power, 0.0, where=hidden)
    total = np.add.reduce(power, axis=-1)
    if blind is not None:
        total[:, blind] = 1.0
    return Softmax(hidden, blind, logit, gap, -np.minimum.reduce(gap, axis=-1), peak, power, stack, total)
