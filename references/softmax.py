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

    def of_keys(self, of_sequences: Float64Array) -> Float64Array:
        """[num_kv_heads, sequences, columns] to the shape of the values of this piece, or what broadcasts to it."""
        mine = of_sequences[self.heads, self.sequences]
        if len(self.parts) == 1:
            return mine
        return np.repeat(mine, [keys.stop - keys.start for _, keys, _ in self.parts], axis=-2)


# Makes something of the keys or values of a piece; the last argument is room for it.
Make = Callable[[Float64Array, Piece, Float64Array], Float64Array]
# An array like ``Sequences.key``, or what gives a piece of it, which the next piece overwrites.
Made = Float64Array | Callable[[Piece], Float64Array]


def taken(made: Made, piece: Piece) -> Float64Array:
    """A piece of it."""
    return made(piece) if callable(made) else made[..., piece.heads, piece.keys, :]


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

    def made(self, x: Float64Array, make: Make, several: int = 0) -> Made:
        """Something made of ``key`` or ``value``: now if there is one piece, else whenever a piece of it is taken.

        Args:
            x: ``key`` or ``value``.
            make: what makes it.
            several: 0: an array like ``x``. Else so many, [several, ...].
        """
        before = (several,) if several else ()
        if len(self.pieces) == 1:
            return make(x, self.pieces[0], np.empty((*before, *x.shape)))
        room = np.empty(max(1, several) * max(NUMBERS_AT_ONCE, x.shape[-1]))

        def of_piece(piece: Piece) -> Float64Array:
            mine = x[piece.heads, piece.keys]
            return make(mine, piece, room[: max(1, several) * mine.size].reshape(*before, *mine.shape))

        return of_piece

    def scores(self, query: Float64Array, of_keys: Made) -> Float64Array:
        """query . key, [num_kv_heads, rows, kv_len]; 0 beyond the keys of a sequence."""
        if len(self.rows) == 1 and not callable(of_keys):
            return query @ of_keys.swapaxes(-1, -2)
        result = np.zeros((*query.shape[:2], self.kv_len))
        for piece in self.pieces:
            key = taken(of_keys, piece).swapaxes(-1, -2)
            for rows, keys, columns in piece.parts:
                np.matmul(query[piece.heads, rows], key[..., keys], out=result[piece.heads, rows, columns])
        return result

    def sums(self, of_values: Made, *weights: Float64Array) -> list[Float64Array]:
        """Sums over keys with weights [num_kv_heads, rows, kv_len]: [..., num_kv_heads, rows, head_dim] each."""
        if len(self.rows) == 1 and not callable(of_values):
            return [weight @ of_values for weight in weights]
        results: list[Float64Array] = []
        for piece in self.pieces:
            value = taken(of_values, piece)
            if not results:
                results = [np.empty((*value.shape[:-3], *self.query.shape)) for _ in weights]
            for rows, keys, columns in piece.parts:
                its_value = value[..., keys, :]
                for weight, result in zip(weights, results, strict=True):
                    its_weight, its_result = weight[piece.heads, rows, columns], result[..., piece.heads, rows, :]
                    if columns.start == 0:
                        np.matmul(its_weight, its_value, out=its_result)
                    else:
                        its_result += its_weight @ its_value
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


@dataclass(frozen=True)
class Magnitudes:
    """abs of queries, keys and values, subnormal numbers lifted where a tensor core lifts them.

    Attributes:
        query, key: lifted.
        value: not lifted.
        lifted_value: the same object as ``value`` if nothing is lifted.
        all_values: [num_kv_heads, sequences, head_dim], sum of ``value`` over the keys of each sequence.
        largest: of query, key and value, not lifted; NaN or infinite if an input is.
    """

    query: Float64Array
    key: Made
    value: Made
    lifted_value: Made
    all_values: Float64Array
    largest: tuple[float, float, float]


def magnitudes_of(sequences: Sequences, fmt: Format, fused: bool) -> Magnitudes:
    """The magnitudes of all inputs."""

    def absolute(x: Float64Array, _: Piece, room: Float64Array) -> Float64Array:
        return np.abs(x, out=room)

    def lifted(x: Float64Array, _: Piece, room: Float64Array) -> Float64Array:
        return lifted_magnitude(np.abs(x, out=room), fmt, fused)

    query = np.abs(sequences.query)
    key, value = (sequences.made(x, absolute) for x in (sequences.key, sequences.value))
    largest_key, largest_value, lifts = np.float64(0.0), np.float64(0.0), False
    all_values = np.zeros((len(sequences.value), len(sequences.rows), sequences.value.shape[-1]))
    for piece in sequences.pieces:
        largest_key = np.maximum(largest_key, taken(key, piece).max())
        sizes = taken(value, piece)
        largest_value = np.maximum(largest_value, sizes.max())
        lifts = lifts or (fused and bool(((sizes > 0) & (sizes < fmt.smallest_normal)).any()))
        for sequence, (_, keys, _) in enumerate(piece.parts, piece.sequences.start):
            all_values[piece.heads, sequence] += np.add.reduce(sizes[:, keys], axis=-2)
    return Magnitudes(
        query=lifted_magnitude(query, fmt, fused),
        key=sequences.made(sequences.key, lifted) if fused else key,
        value=value,
        lifted_value=sequences.made(sequences.value, lifted) if lifts else value,
        all_values=all_values,
        largest=(float(query.max()), float(largest_key), float(largest_value)),
    )


def softmax_of(sequences: Sequences, scale: float) -> Softmax:
    """The softmax of finite inputs."""
    hidden = sequences.hidden
    logit = sequences.scores(sequences.query * (scale * LOG2_E), sequences.key)
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
