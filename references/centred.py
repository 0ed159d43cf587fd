"""Weighted distances of the values from the exact output."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from references.softmax import Piece, Sequences, Softmax, taken

Float64Array = NDArray[np.float64]

# How much of the other terms of a budget, and of itself, the quick way may lose to cancellation.
CANCELLATION_SHARE = 2.0**-20
# Numbers held at once where distances are formed one by one.
CHUNK = 1 << 19


class Centred:
    """Bounds sum_j s_j |v_j - o| from above for shares s_j >= 0 of the keys: its root-mean-square form.

    The quick way takes two matrix products, of values relative to a centre near all outputs, and the heaviest key
    by itself, because where it has nearly all of the weight, o is nearly its value. What float64 may lose in it
    is added. The slow way forms every v_j - o, and loses nothing.
    """

    def __init__(self, sequences: Sequences, exact: Softmax, out: Float64Array) -> None:
        """Take the values of all sequences and the outputs [heads, rows, head_dim]."""
        self.sequences, self.out = sequences, out
        self.lost = (sequences.kv_len + 8) * 2.0**-53  # of sums of products of three numbers, in float64
        # Where a sequence has one row its centre is the output itself: v_j - o, and nothing to cancel.
        self.one_row = out.shape[-2] == len(sequences.rows)
        self.centre = out if self.one_row else out.mean(axis=-2, keepdims=True)
        self.moved = sequences.made(sequences.value, self._moved)
        self.square = sequences.made(sequences.value, self._square)
        if self.one_row:
            return
        self.offset = -2 * (out - self.centre)
        self.offset_square = self.offset * self.offset
        self.offset_square *= 0.25
        top = exact.logit.argmax(axis=-1)
        self.heaviest = np.arange(top.size).reshape(top.shape) * sequences.kv_len + top
        heads = np.arange(len(out))[:, None] * sequences.value.shape[1]
        flat = sequences.value.reshape(-1, sequences.value.shape[-1])
        distance = flat.take(heads + sequences.first_key + top, axis=0)
        distance -= out
        distance *= distance
        self.heaviest_square = distance

    def _moved(self, value: Float64Array, piece: Piece, room: Float64Array) -> Float64Array:
        centre = piece.of_keys(self.centre) if self.one_row else self.centre[piece.heads]
        return np.subtract(value, centre, out=room)

    def _square(self, value: Float64Array, piece: Piece, room: Float64Array) -> Float64Array:
        moved = taken(self.moved, piece) if isinstance(self.moved, np.ndarray) else self._moved(value, piece, room)
        return np.multiply(moved, moved, out=room)

    def __call__(self, share: Float64Array, mass: Float64Array, tolerance: Float64Array) -> Float64Array:
        """The bound, like the outputs.

        Args:
            share: [heads, rows, kv_len]
            mass: [heads, rows, 1], its sums.
            tolerance: like the outputs; where the quick way may be off by more, the slow way is taken.
        """
        if self.one_row:
            (second,) = self.sequences.sums(self.square, share)
            second *= (1 + self.lost) * mass
            return np.sqrt(second, out=second)
        flat = share.reshape(-1)
        heaviest = flat[self.heaviest]
        flat[self.heaviest] = 0.0
        rest = share.sum(axis=-1)[..., None]
        (second,) = self.sequences.sums(self.square, share)
        (bound,) = self.sequences.sums(self.moved, share)
        flat[self.heaviest] = heaviest
        bound *= self.offset
        second += rest * self.offset_square
        bound += second
        np.maximum(bound, 0.0, out=bound)
        bound += heaviest[..., None] * self.heaviest_square
        bound *= (1 + self.lost) * mass
        # The middle term is at most the sum of the outer ones.
        second *= 2 * self.lost * mass
        bound += second
        np.sqrt(bound, out=bound)
        tolerance = tolerance + CANCELLATION_SHARE * bound
        tolerance *= bound
        doubtful = second > tolerance  # sqrt(a + b) - sqrt(a) <= b / sqrt(a + b)
        if doubtful.any():
            self._one_by_one(share, np.asarray(doubtful.any(axis=-1)), bound)
        return bound

    def _one_by_one(self, share: Float64Array, rows: NDArray[np.bool_], bound: Float64Array) -> None:
        """The slow way, for some rows, [heads, rows]."""
        for mine, keys in zip(self.sequences.rows, self.sequences.keys, strict=True):
            value = self.sequences.value[:, keys]
            step = max(1, CHUNK // value[0].size)
            for h in np.flatnonzero(rows[:, mine].any(axis=-1)):
                chosen = mine.start + np.flatnonzero(rows[h, mine])
                for some in (chosen[i : i + step] for i in range(0, len(chosen), step)):
                    distance = value[h] - self.out[h, some, None, :]
                    distance *= distance
                    shares = share[h, some, : value.shape[-2]]
                    second = (shares[:, None, :] @ distance)[:, 0]
                    bound[h, some] = np.sqrt(second * shares.sum(axis=-1, keepdims=True) * (1 + self.lost))
