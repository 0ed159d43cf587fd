"""How far the computed softmax weights may be from the exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from references.pieces import Make
from references.rounding_errors import Arithmetic, Error
from references.softmax import LN_2, LOG2_E, Sequences, Softmax, lifted_magnitude
from references.tiling import ONE_TILE, Count, Counts, Layout, add_to_keys, highest, path

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


# Up to this exponent, in natural units, phi is bounded by the exponent times a number of the row.
LINEAR_UP_TO = 2.0**-10


@dataclass(frozen=True)
class Deviations:
    """What the computed weights of a softmax may deviate; [num_kv_heads, rows] unless said otherwise.

    phi is the bound on the relative error of a weight that numerator and denominator have in common.
    """

    exponent: Float64Array  # [num_kv_heads, rows, kv_len] log2(1 + phi)
    largest: Float64Array  # at least the largest exponent, in natural units
    linear: Float64Array  # [num_kv_heads, rows, kv_len], phi <= linear * slope
    slope: Float64Array
    wide: BoolArray | None  # the rows with exponents above LINEAR_UP_TO, where linear is phi; None: there is none
    shared: Float64Array | None  # [num_kv_heads, rows, kv_len] part of phi that is one function of the gap; the alarm's
    exponentials: Error  # at most of those of a key, in octaves
    theta: float  # relative error of the constant
    shift: Float64Array  # error that all logits have in common, in octaves
    reach: Float64Array  # how far the computed maximum may be off, in octaves
    rescaling: Error  # of the accumulator and of the row sum, [..., rows]
    row_sum: Error  # of the row sum, rescaling included, [..., rows]

    def phi(self) -> Float64Array:
        """[num_kv_heads, rows, kv_len]"""
        return self.linear * self.slope[..., None]


def column(x: Count | Error) -> NDArray[Any]:
    """[..., rows] to [..., rows, 1]."""
    return x[..., None] if isinstance(x, np.ndarray) else np.array([float(x)])


@dataclass(frozen=True)
class ScoreSizes:
    """What the errors of scores are multiples of, [num_kv_heads, rows, kv_len]; subnormal numbers lifted, see (1).

    Attributes:
        of_products: sum_d abs(q_d k_jd).
        of_keys: sum_d abs(k_jd); None where the scale is not multiplied into the query.
    """

    of_products: Float64Array
    of_keys: Float64Array | None

    def copy(self) -> ScoreSizes:
        """Sizes to be overwritten."""
        return ScoreSizes(self.of_products.copy(), self.of_keys)


def scores_of(sequences: Sequences, scale: float, arithmetic: Arithmetic) -> tuple[Float64Array, ScoreSizes]:
    """Logits in base 2, [num_kv_heads, rows, kv_len], and the sizes of their scores; any inputs."""

    def size(key: Float64Array, room: Float64Array) -> Float64Array:
        return lifted_magnitude(np.abs(key, out=room), arithmetic.fmt, arithmetic.fused)

    query = lifted_magnitude(np.abs(sequences.query), arithmetic.fmt, arithmetic.fused)
    wanted: list[tuple[Float64Array, Make | None]] = [(query, size), (sequences.query, None)]
    if arithmetic.model.scale_into_query:
        wanted.append((np.ones_like(query), size))
    of_products, logit, *of_keys = sequences.scores(*wanted)
    logit *= scale * LOG2_E  # only now, so that equal scores are equal logits
    return logit, ScoreSizes(of_products, of_keys[0] if of_keys else None)


def deviations_of(
    sequences: Sequences,
    exact: Softmax,
    sizes: ScoreSizes,
    scale: float,
    arithmetic: Arithmetic,
    seen: Counts,
    tiles: list[Layout],
) -> Deviations:
    """Sections (1) to (3): scores, logits, exponentials. The sizes are overwritten."""
    model, u = arithmetic.model, arithmetic.u
    c = abs(scale) * LOG2_E

    # (1) |z_hat - z| <= g a + eta, and (2) t_hat = (1 + theta) t + rho with |rho| <= r; here (1 + u) r in octaves.
    g = arithmetic.score
    score_floor = (1 + g) * 2 * arithmetic.head_dim * arithmetic.floor
    theta = model.scale_error
    if 0 < c < 2 * model.work.smallest_normal:
        theta += 2 * arithmetic.floor / c
    factor = (1 + u) * c * (1 + theta)
    if sizes.of_keys is not None:
        query_floor = arithmetic.fmt.underflow_error() + 2 * arithmetic.floor
        if arithmetic.fused:  # the scaled query may be subnormal where the query is not
            query_floor += g * arithmetic.fmt.smallest_normal
        exponent = np.multiply(sizes.of_products, factor * g, out=sizes.of_products)
        exponent += sizes.of_keys * ((1 + u) * (1 + g) * query_floor)
        constant = (1 + u) * score_floor
        room = np.empty_like(exponent)
    else:
        factor *= 1 + u
        exponent = np.multiply(sizes.of_products, factor * g, out=sizes.of_products)
        constant = factor * score_floor + (1 + u) * arithmetic.floor
        room = np.abs(exact.logit)
        room *= (1 + u) * u * (1 + theta)
        exponent += room
    if exact.hidden is not None:
        np.copyto(exponent, 0.0, where=exact.hidden)

    way = ONE_TILE
    if any(len(order.starts) > 1 for order in tiles):
        of_tiles = highest([exact.logit, exponent], sequences.rows, tiles)
        top, off = of_tiles[:, :, 0], np.maximum(of_tiles[:, :, 1], 0.0)
        # A constant that may have been flushed says nothing about the order of the logits.
        off += constant
        off *= 1 / (1 - theta) if theta < 0.5 else 1e300
        way = path(top + off, top - off, seen.splits, merge=model.merge)
    rescaling = arithmetic.rescaling(seen, way)
    row_sum = arithmetic.row_sum(seen, rescaling)

    # (3) A factor common to all logits acts through the gap only; differences telescope.
    exponent += np.multiply(exact.gap, -(theta * (1 + u) + u), out=room)
    tau_max = np.maximum.reduce(exponent, axis=-1)
    tau_max += constant
    of_rows = u * (3 if model.contraction else 1) * tau_max
    each = -math.log1p(-model.exp2_error) / LN_2
    most: Error
    of_rows += constant
    shared: Float64Array | None = None
    if arithmetic.confidence is not None:
        shared = np.multiply(exact.gap, -theta, out=room)
    if isinstance(way.exps, int):
        most = each * way.exps
        largest = tau_max + of_rows + most
        exponent += column(of_rows + most)
        if shared is not None:
            shared += most
    else:
        exponentials = np.multiply(way.exps, each)  # [tiles of a split, splits, heads, rows]
        most = np.maximum.reduce(exponentials, axis=(0, 1))
        largest = tau_max + of_rows + most
        if shared is not None:
            add_to_keys(shared, exponentials, sequences.rows, tiles)
        exponentials += of_rows
        add_to_keys(exponent, exponentials, sequences.rows, tiles)
    if model.stores_of_lse:
        stored = _stored_lse(exact, column(tau_max), arithmetic, seen, row_sum)
        exponent += stored
        largest = np.maximum.reduce(exponent, axis=-1)
        shared = None if shared is None else shared + stored

    # phi = expm1(exponent) is convex: up to x it is below its chord.
    largest *= LN_2
    linear, wide = exponent, ~(largest <= LINEAR_UP_TO)
    slope = LN_2 * (1 + 0.501 * largest)
    if wide.any():
        linear = exponent.copy()
        linear[wide] = np.expm1(LN_2 * exponent[wide])
        slope[wide] = 1.0
    if shared is not None:
        shared *= LN_2
        np.expm1(shared, out=shared)
    shift = theta * np.abs(exact.peak)
    of_wide = wide if linear is not exponent else None
    return Deviations(
        exponent, largest, linear, slope, of_wide, shared, most, theta, shift, shift + tau_max, rescaling, row_sum
    )


def _stored_lse(
    exact: Softmax, tau_max: Float64Array, arithmetic: Arithmetic, seen: Counts, row_sum: Error
) -> Float64Array:
    """(8) What merging through stored log-sum-exps adds to the exponent, in octaves; it is not shift invariant."""
    model, u = arithmetic.model, arithmetic.u
    spread = np.log2(np.maximum(column(seen.split_keys) * column(seen.splits), 1))
    level = np.maximum(np.abs(exact.logit), np.abs(exact.peak)[..., None]) + spread + tau_max + 1
    octaves = 3 * u * level + u * (spread + tau_max - exact.gap) + model.log2_error * (1 + spread)
    octaves -= np.log1p(-np.minimum(column(row_sum), 0.5)) / LN_2
    octaves *= model.stores_of_lse
    hidden = column(seen.splits) <= 1 if exact.hidden is None else exact.hidden | (column(seen.splits) <= 1)
    return np.where(hidden, 0.0, octaves)


def p_rounding(exact: Softmax, arithmetic: Arithmetic) -> Error:
    """(4) Relative error of rounding the weight of each key to P's format, underflow included.

    P is rounded relative to a running maximum that is not above the final one, so it is at least 2**-gap;
    what rounds to zero errs by itself and no more.
    """
    if not arithmetic.rounds_p:
        return 0.0
    fmt, mode = arithmetic.p_format, arithmetic.model.p_rounding
    relative = fmt.unit_roundoff(mode)
    if exact.widest.max() < -fmt.emin:
        return relative
    with np.errstate(over="ignore"):
        error = np.exp2(-exact.gap)
        error *= fmt.underflow_error(mode)
    np.maximum(error, relative, out=error)
    return np.minimum(error, 1.0, out=error)
