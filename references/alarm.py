"""Errors that are independent from key to key, added as the root of their squares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.rounding_errors import Error
from references.softmax import LN_2, Sequences, Softmax

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Numbers held at once while contributions of keys are added up.
CHUNK = 1 << 19


@dataclass(frozen=True)
class ByGap:
    """The keys of every row in the order of their gaps, [num_kv_heads, rows, kv_len]; hidden ones weigh nothing."""

    order: NDArray[np.intp]
    gap: Float64Array  # ascending

    def sorted(self, of_keys: Float64Array) -> Float64Array:
        """[num_kv_heads, rows, kv_len] in this order."""
        return np.take_along_axis(of_keys, self.order, axis=-1)

    def equal(self) -> BoolArray:
        """True where a new group of equal logits begins: their scores err alike."""
        return _begins(self.gap)

    def alike(self, p_error: Error) -> BoolArray:
        """True where a new group of weights begins that agree to a quarter of P's rounding error: they round alike."""
        return _begins(np.floor(self.gap * (4 * LN_2 / np.min(p_error))))


def by_gap(exact: Softmax) -> ByGap:
    """Sort the keys of every row."""
    gap = -exact.gap
    order = np.argsort(gap, axis=-1, kind="stable")
    return ByGap(order, np.take_along_axis(gap, order, axis=-1))


def _begins(labels: Float64Array) -> BoolArray:
    first = np.ones(labels.shape, dtype=np.bool_)
    np.not_equal(labels[..., 1:], labels[..., :-1], out=first[..., 1:])
    return first


def _norms(begins: BoolArray, contributions: Float64Array) -> Float64Array:
    """Root of the sum over groups of (sum over the group)**2: [rows, kv_len, columns] to [rows, columns]."""
    rows, kv_len, columns = contributions.shape
    first = np.flatnonzero(begins)
    sums = np.add.reduceat(contributions.reshape(rows * kv_len, columns), first, axis=0)
    sums *= sums
    of_row = np.searchsorted(first, np.arange(rows) * kv_len)
    norms: Float64Array = np.sqrt(np.add.reduceat(sums, of_row, axis=0))
    return norms


def independent_errors(
    keys: ByGap, own: Float64Array, rounded: Float64Array, p_error: Error, sequences: Sequences, out: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Root-sum-squares of the errors that are independent from key to key: scores, and roundings of P.

    Errors that are alike are added before they are squared.

    Args:
        keys: the order.
        own: [num_kv_heads, rows, kv_len] error of each weight that comes from its own score.
        rounded: like ``own``, error of each weight that comes from its rounding.
        p_error: relative error of that rounding.
        sequences: the values.
        out: [num_kv_heads, rows, head_dim], exact.

    Returns:
        Two arrays like ``out``.
    """
    score, rounding = np.zeros_like(out), np.zeros_like(out)
    own, equal = keys.sorted(own), keys.equal()
    rounds = bool(np.any(p_error))
    alike = keys.alike(p_error) if rounds else equal
    rounded = keys.sorted(rounded) if rounds else rounded
    for mine, theirs in zip(sequences.rows, sequences.keys, strict=True):
        value = sequences.value[:, theirs]
        kv_len = value.shape[-2]
        step = max(1, CHUNK // value[0].size)
        for h, values in enumerate(value):
            for start in range(mine.start, mine.stop, step):
                some = slice(start, min(start + step, mine.stop))
                # Places that only longer sequences have weigh nothing.
                in_order = values[np.minimum(keys.order[h, some], kv_len - 1)]  # [rows, kv_len, head_dim]
                if rounds:
                    sizes = np.abs(in_order)
                    sizes *= rounded[h, some, :, None]
                    rounding[h, some] = _norms(alike[h, some], sizes)
                in_order -= out[h, some, None, :]
                np.abs(in_order, out=in_order)
                in_order *= own[h, some, :, None]
                score[h, some] = _norms(equal[h, some], in_order)
    return score, rounding


def independent_norm(keys: ByGap, own: Float64Array) -> Float64Array:
    """Root-sum-square over keys of ``own`` [num_kv_heads, rows, kv_len], equal logits added first."""
    own, equal = keys.sorted(own), keys.equal()
    return np.stack([_norms(first, numbers[..., None])[..., 0] for first, numbers in zip(equal, own, strict=True)])
