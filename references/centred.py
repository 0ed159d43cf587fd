"""Weighted distances of the values from the exact output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from references.softmax import Piece, Sequences

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# How much of the other terms of a budget, and of itself, the quick way may lose to cancellation.
CANCELLATION_SHARE = 2.0**-20
# Numbers held at once where distances are formed one by one.
CHUNK = 1 << 19


class Centred:
    """Bounds sum_j s_j abs(v_j - o) from above for shares s_j >= 0 of the keys: its root-mean-square form.

    The quick way takes two matrix products, of values relative to a centre near all outputs, and adds what float64 may
    lose in it. Where that is too much, it takes them again with the heaviest key by itself, because where that has
    nearly all of the weight, o is nearly its value. The slow way forms every v_j - o, and loses nothing.
    """

    def __init__(self, sequences: Sequences, out: Float64Array) -> None:
        """Take the values of all sequences and the outputs [heads, rows, head_dim]."""
        self.sequences, self.out = sequences, out
        self.lost = (sequences.kv_len + 8) * 2.0**-53  # of sums of products of three numbers, in float64
        # Where a sequence has one row its centre is the output itself: v_j - o, and nothing to cancel.
        self.one_row = out.shape[-2] == len(sequences.rows)
        self.centre = out if self.one_row else np.add.reduce(out, axis=-2, keepdims=True) * (1 / out.shape[-2])
        self.moments = sequences.made(sequences.value, self._moments, 1 if self.one_row else 2)
        if not self.one_row:
            self.offset = self.centre - out
            self.offset_square = self.offset * self.offset
            self.offset *= 2

    def _moments(self, value: Float64Array, piece: Piece, room: Float64Array) -> Float64Array:
        """[moments, ...]: the square of the distance from the centre, and before it, if it is needed, the distance."""
        centre = piece.of_keys(self.centre) if self.one_row else self.centre[piece.heads]
        moved = np.subtract(value, centre, out=room[0])
        np.multiply(moved, moved, out=room[-1])
        return room

    def __call__(
        self,
        share: Float64Array,
        mass: Float64Array,
        factor: Float64Array,
        others: Callable[[], Float64Array],
        out: Float64Array | None = None,
    ) -> Float64Array:
        """The bound, times a factor; like the outputs.

        Args:
            share: [heads, rows, kv_len]
            mass: [heads, rows], its sums.
            factor: [heads, rows]
            others: gives the rest of the budget, like the outputs: where the quick way may lose more than a share of
                that and of the bound, the slow way is taken.
            out: where to put the bound; None: a new array.
        """
        factor = (factor * np.sqrt(mass * (1 + self.lost)))[..., None]
        out = np.empty_like(self.out) if out is None else out
        if self.one_row:
            (second,) = self.sequences.sums(self.moments, share)[0]
            np.multiply(np.sqrt(second, out=second), factor, out=out)
            return out
        if self._quick(share, mass, None, factor, others, out) is not None:
            doubtful = self._heaviest_apart(share, factor, others, out)
            if doubtful is not None:
                self._one_by_one(share, factor, doubtful, out)
        return out

    def _quick(
        self,
        share: Float64Array,
        mass: Float64Array,
        apart: Float64Array | None,
        factor: Float64Array,
        others: Callable[[], Float64Array],
        out: Float64Array,
    ) -> BoolArray | None:
        """The quick way, with something added to the sum of squares: [heads, rows] where it is not enough, or None."""
        bound, second = self.sequences.sums(self.moments, share)[0]
        bound *= self.offset
        second += mass[..., None] * self.offset_square
        bound += second
        if apart is not None:
            np.maximum(bound, 0.0, out=bound)
            bound += apart
        # The middle term is at most the sum of the outer ones.
        second *= 2 * self.lost
        bound += second
        # sqrt(a + b) - sqrt(a) <= b / sqrt(a + b), where a is not negative
        surely = second * (1 / CANCELLATION_SHARE)
        if not (surely > bound).any():
            np.multiply(np.sqrt(bound, out=bound), factor, out=out)
            return None
        np.maximum(bound, second, out=bound)
        np.sqrt(bound, out=bound)
        np.multiply(bound, factor, out=out)
        bound *= others() + out
        surely *= factor
        doubtful = surely > bound
        return np.asarray(doubtful.any(axis=-1)) if doubtful.any() else None

    def _heaviest_apart(
        self, share: Float64Array, factor: Float64Array, others: Callable[[], Float64Array], out: Float64Array
    ) -> BoolArray | None:
        """The quick way with the heaviest key of each row by itself."""
        heaviest = share.argmax(axis=-1)
        places = np.arange(heaviest.size).reshape(heaviest.shape) * share.shape[-1] + heaviest
        heads = np.arange(len(out))[:, None] * self.sequences.value.shape[1]
        values = self.sequences.value.reshape(-1, out.shape[-1])
        apart = values[heads + self.sequences.first_key + heaviest]
        apart -= self.out
        apart *= apart
        flat = share.reshape(-1)
        its_share = flat[places]
        apart *= its_share[..., None]
        flat[places] = 0.0
        doubtful = self._quick(share, np.add.reduce(share, axis=-1), apart, factor, others, out)
        flat[places] = its_share
        return doubtful

    def _one_by_one(self, share: Float64Array, factor: Float64Array, rows: BoolArray, bound: Float64Array) -> None:
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
                    bound[h, some] = np.sqrt((shares[:, None, :] @ distance)[:, 0]) * factor[h, some]
