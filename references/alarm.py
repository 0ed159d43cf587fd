"""Errors that are independent from key to key, added as the root of their squares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from references.weight_errors import LN_2, Weights

Float64Array = NDArray[np.float64]


def independent_errors(
    weights: Weights, value: Float64Array, out: Float64Array, p_error: Float64Array | float
) -> tuple[Float64Array, Float64Array]:
    """Root-sum-squares of the errors that are independent from key to key: scores, and roundings of P.

    Equal logits err alike, and weights that agree to a quarter of P's rounding error round alike: their
    errors are added before they are squared.
    """
    score, rounding = np.zeros_like(out), np.zeros_like(out)
    own = weights.weight * (weights.deviation - weights.shared)
    grown = weights.weight * (1 + weights.deviation) * p_error
    bins_per_octave = 4 * LN_2 / np.min(p_error) if np.any(p_error) else 0.0
    for h in range(out.shape[0]):
        for row in range(out.shape[1]):
            seen = np.flatnonzero(weights.visible[row])
            if seen.size == 0:
                continue
            order = seen[np.argsort(weights.gap[h, row, seen], kind="stable")]
            gap = weights.gap[h, row, order]
            values = value[h, order]

            def grouped(labels: Float64Array, contributions: Float64Array) -> Float64Array:
                first = np.flatnonzero(np.diff(labels, prepend=-1.0))
                sums = np.add.reduceat(contributions, first, axis=0)
                norm: Float64Array = np.sqrt((sums**2).sum(axis=0))
                return norm

            score[h, row] = grouped(gap, own[h, row, order, None] * np.abs(values - out[h, row]))
            if bins_per_octave:
                rounding[h, row] = grouped(np.floor(gap * bins_per_octave), grown[h, row, order, None] * np.abs(values))
    return score, rounding


def grouped_norm(weights: Weights, own: Float64Array) -> Float64Array:
    """Root-sum-square over keys, equal logits added first."""
    norm = np.zeros(own.shape[:-1])
    for h in range(own.shape[0]):
        for row in range(own.shape[1]):
            _, group = np.unique(weights.gap[h, row, weights.visible[row]], return_inverse=True)
            norm[h, row] = np.sqrt((np.bincount(group, own[h, row, weights.visible[row]]) ** 2).sum())
    return norm
