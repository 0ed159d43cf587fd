"""Weighted distances of the values from the exact output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from references.softmax import Sequences

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
# Sums over keys of s_j v_j and of s_j v_j**2, like the outputs.
Moments = tuple[Float64Array, Float64Array]

# How much of the other terms of a budget, and of itself, the quick way may lose to cancellation.
CANCELLATION_SHARE = 2.0**-20
# Numbers held at once where distances are formed one by one.
CHUNK = 1 << 19


class Centred:
    """The root of sum_j s_j (v_j - o)**2 for shares s_j >= 0 of the keys, from above.

    The quick way is made of two sums that are taken with those of the other terms, and adds what float64 may lose in
    it. Where that is too much, it takes them again with the heaviest key by itself, because where that has nearly all
    of the weight, o is nearly its value. The slow way forms every v_j - o, and loses nothing.
    """

    def __init__(self, sequences: Sequences, out: Float64Array) -> None:
        """Take the values of all sequences and the outputs [heads, rows, head_dim]."""
        self.sequences, self.out = sequences, out
        self.lost = (sequences.kv_len + 8) * 2.0**-53  # of sums of products of three numbers, in float64
        self.double, self.square = -2 * out, out * out

    def __call__(
        self,
        share: Float64Array,
        moments: Moments,
        mass: Float64Array,
        factor: Float64Array,
        others: Callable[[], Float64Array],
        out: Float64Array | None = None,
    ) -> Float64Array:
        """The root, times a factor; like the outputs.

        Args:
            share: [heads, rows, kv_len]
            moments: of the values with these shares; overwritten.
            mass: [heads, rows], sums of the shares.
            factor: [heads, rows]
            others: gives the rest of the budget, like the outputs: where the quick way may lose more than a share of
                that and of the root, the slow way is taken.
            out: where to put the root; None: a new array.
        """
        factor = factor[..., None]
        out = np.empty_like(self.out) if out is None else out
        if self._quick(moments, mass, None, factor, others, out) is not None:
            doubtful = self._heaviest_apart(share, factor, others, out)
            if doubtful is not None:
                self._one_by_one(share, factor, doubtful, out)
        return out

    def mean(
        self,
        share: Float64Array,
        moments: Moments,
        mass: Float64Array,
        factor: Float64Array,
        others: Callable[[], Float64Array],
        out: Float64Array | None = None,
    ) -> Float64Array:
        """A bound of sum_j s_j abs(v_j - o) times a factor, its root-mean-square form; arguments as above."""
        return self(share, moments, mass, factor * np.sqrt(mass * (1 + self.lost)), others, out)

    def _quick(
        self,
        moments: Moments,
        mass: Float64Array,
        apart: Float64Array | None,
        factor: Float64Array,
        others: Callable[[], Float64Array],
        out: Float64Array,
    ) -> BoolArray | None:
        """The quick way, with something added to the sum of squares: [heads, rows] where it is not enough, or None."""
        bound, second = moments
        bound *= self.double
        second += mass[..., None] * self.square
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
        heads, rows = np.arange(len(out))[:, None], np.arange(out.shape[1])
        apart = self.sequences.value[heads, self.sequences.first_key + heaviest]
        apart -= self.out
        apart *= apart
        its_share = share[heads, rows, heaviest]
        apart *= its_share[..., None]
        share[heads, rows, heaviest] = 0.0
        (first,), (second,) = self.sequences.sums((None, [share]), (np.square, [share]))
        doubtful = self._quick((first, second), np.add.reduce(share, axis=-1), apart, factor, others, out)
        share[heads, rows, heaviest] = its_share
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
