"""How far the computed softmax weights may be from the exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.rounding_errors import Arithmetic, Error, expm1_bound
from references.softmax import LN_2, LOG2_E, Magnitudes, Sequences, Softmax
from references.tiling import ONE_TILE, Counts, Layout, Path, add_to_keys, highest, path

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Deviations:
    """What the computed weights of a softmax may deviate; [num_kv_heads, rows, kv_len] unless said otherwise."""

    exponent: Float64Array  # log(1 + phi)
    largest: float  # exponent of all
    phi: Float64Array  # bound on the relative error common to numerator and denominator
    shared: Float64Array  # the part of phi that is the same function for all keys, for the alarm
    shift: Float64Array  # [num_kv_heads, rows] error that all logits have in common, in octaves
    reach: Float64Array  # [num_kv_heads, rows] how far the computed maximum may be off, in octaves
    way: Path
    rescaling: Error  # of the accumulator and of the row sum, [..., rows]
    row_sum: Error  # of the row sum, rescaling included, [..., rows]


def column(x: Error | NDArray[np.int64]) -> Float64Array:
    """[..., rows] to [..., rows, 1]."""
    return np.asarray(x, dtype=np.float64)[..., None]


def deviations_of(
    sequences: Sequences,
    exact: Softmax,
    sizes: Magnitudes,
    scale: float,
    arithmetic: Arithmetic,
    seen: Counts,
    tiles: list[Layout],
) -> Deviations:
    """Sections (1) to (3): scores, logits, exponentials."""
    model, u = arithmetic.model, arithmetic.u
    c = abs(scale) * LOG2_E

    # (1) |z_hat - z| <= g a + eta, and (2) t_hat = (1 + theta) t + rho with |rho| <= r.
    g = arithmetic.score
    score_floor = (1 + g) * 2 * arithmetic.head_dim * arithmetic.floor
    theta = model.scale_error
    if 0 < c < 2 * model.work.smallest_normal:
        theta += 2 * arithmetic.floor / c
    b = LN_2 * (1 + u)  # r counts in natural units of the exponent from here on, times b
    if model.scale_into_query:
        r = exact.products * (b * c * (1 + theta) * g)
        query_floor = arithmetic.fmt.underflow_error() + 2 * arithmetic.floor
        if arithmetic.fused:  # the scaled query may be subnormal where the query is not
            query_floor += g * arithmetic.fmt.smallest_normal
        floors = np.full_like(sizes.query, b * (1 + g) * query_floor)
        r += sequences.scores(floors, sizes.key) + b * score_floor
    else:
        factor = c * (1 + theta) * (1 + u)
        r = exact.products * (b * factor * g)
        r += exact.magnitude * (b * u * (1 + theta))
        r += b * (factor * score_floor + arithmetic.floor)
    if exact.hidden is not None:
        np.copyto(r, 0.0, where=exact.hidden)

    way = ONE_TILE
    if any(len(order.starts) > 1 for order in tiles):
        # A constant that may have been flushed says nothing about the order of the logits.
        uncertainty = r * (1 / (1 - theta) / b) if theta < 0.5 else np.full_like(r, 1e300)
        bounds = np.empty((2, *r.shape))
        np.add(exact.logit, uncertainty, out=bounds[0])
        np.subtract(exact.logit, uncertainty, out=bounds[1])
        of_tiles = highest(bounds, sequences.rows, tiles)
        way = path(of_tiles[:, :, 0], of_tiles[:, :, 1], seen.splits, grouped=model.merge == "grouped")
    rescaling = arithmetic.rescaling(seen, way)
    row_sum = arithmetic.row_sum(seen, rescaling)

    # (3) A factor common to all logits acts through the gap only; differences telescope.
    exponent = exact.gap * (theta * b)
    exponent += r  # tau
    tau_max = exponent.max(axis=-1) / b
    exponentials = -math.log1p(-model.exp2_error) * way.exps  # [tiles of a split, splits, heads, rows], or one number
    of_rows = LN_2 * u * (3 if model.contraction else 1) * tau_max
    exponent += np.multiply(exact.gap, LN_2 * u, out=r)
    add_to_keys(exponent, of_rows[None, None] + exponentials, sequences.rows, tiles)
    shared: Float64Array | None = None
    if arithmetic.confidence is not None:
        shared = exact.gap * (LN_2 * theta)
        add_to_keys(shared, exponentials, sequences.rows, tiles)
    if model.merge == "lse":
        stored = _stored_lse(exact, column(tau_max), arithmetic, seen, row_sum)
        exponent += stored
        shared = None if shared is None else shared + stored
    largest = float(exponent.max())
    phi = expm1_bound(exponent, largest)
    shared = phi if shared is None else np.minimum(expm1_bound(shared, largest), phi)
    shift = theta * np.abs(exact.peak)
    return Deviations(exponent, largest, phi, shared, shift, shift + tau_max, way, rescaling, row_sum)


def _stored_lse(
    exact: Softmax, tau_max: Float64Array, arithmetic: Arithmetic, seen: Counts, row_sum: Error
) -> Float64Array:
    """(8) What merging through stored log-sum-exps adds to the exponent; it is not shift invariant."""
    model, u = arithmetic.model, arithmetic.u
    spread = np.log2(np.maximum(column(seen.split_keys) * column(seen.splits), 1))
    level = np.maximum(exact.magnitude, np.abs(exact.peak)[..., None]) + spread + tau_max + 1
    octaves = 3 * u * level + u * (exact.gap + spread + tau_max) + model.log2_error * (1 + spread)
    added: Float64Array = LN_2 * octaves - np.log1p(-np.minimum(column(row_sum), 0.5))
    return np.where(column(seen.splits) > 1, added, 0.0)


def p_rounding(exact: Softmax, arithmetic: Arithmetic) -> Error:
    """(4) Relative error of rounding the weight of each key to P's format, underflow included.

    P is rounded relative to a running maximum that is not above the final one, so it is at least 2**-gap;
    what rounds to zero errs by itself and no more.
    """
    if not arithmetic.rounds_p:
        return 0.0
    fmt, mode = arithmetic.p_format, arithmetic.model.p_rounding
    relative = fmt.unit_roundoff(mode)
    if exact.largest_gap < -fmt.emin:
        return relative
    with np.errstate(over="ignore"):
        error = np.exp2(exact.gap)
        error *= fmt.underflow_error(mode)
    np.maximum(error, relative, out=error)
    return np.minimum(error, 1.0, out=error)
