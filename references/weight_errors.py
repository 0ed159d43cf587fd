"""How far the computed softmax weights may be from the exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.rounding import Format
from references.rounding_errors import Arithmetic, expm1_bound
from references.tiling import Path, Tiles, path

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


@dataclass(frozen=True)
class Weights:
    """The softmax of one sequence and what its computed weights may deviate; [num_kv_heads, rows, kv_len].

    A row is a query of one of the group_size query heads of a kv head.
    """

    visible: BoolArray  # [rows, kv_len]
    weight: Float64Array  # exact, 0 where hidden
    gap: Float64Array  # distance of the logit from the largest one, in octaves
    peak: Float64Array  # [num_kv_heads, rows] largest logit in base 2
    total: Float64Array  # [num_kv_heads, rows] sum of 2**-gap
    exponent: Float64Array  # log(1 + phi)
    deviation: Float64Array  # phi: bound on the relative error common to numerator and denominator
    shared: Float64Array  # the part of phi that is the same function for all keys, for the alarm
    shift: Float64Array  # [num_kv_heads, rows] error that all logits have in common, in octaves
    reach: Float64Array  # [num_kv_heads, rows] how far the computed maximum may be off, in octaves
    way: Path


def lifted_magnitude(x: Float64Array, fmt: Format, fused: bool) -> Float64Array:
    """Magnitudes as a tensor core aligns them: subnormal numbers count as the smallest normal one."""
    magnitude = np.abs(x)
    if not fused or magnitude.min(initial=np.inf) >= fmt.smallest_normal:
        return magnitude
    return np.where(magnitude > 0, np.maximum(magnitude, fmt.smallest_normal), 0.0)


def weights_of(
    query: Float64Array,
    key: Float64Array,
    visible: BoolArray,
    scale: float,
    arithmetic: Arithmetic,
    tiles: Tiles,
) -> Weights:
    """Sections (1) to (3): scores, logits, exponentials."""
    model, u, fmt = arithmetic.model, arithmetic.u, arithmetic.fmt
    head_dim = arithmetic.head_dim
    c = abs(scale) * LOG2_E
    everything = bool(visible.all())

    # (1) |z_hat - z| <= g a + eta, and (2) t_hat = (1 + theta) t + rho with |rho| <= r.
    g = arithmetic.score()
    score_floor = (1 + g) * 2 * head_dim * arithmetic.floor
    theta = model.scale_error
    if 0 < c < 2 * model.work.smallest_normal:
        theta += 2 * arithmetic.floor / c
    t = (query * (scale * LOG2_E)) @ key.swapaxes(-1, -2)
    magnitude = np.abs(t)
    key_size = lifted_magnitude(key, fmt, arithmetic.fused)
    query_size = lifted_magnitude(query, fmt, arithmetic.fused)
    if model.scale_into_query:
        r = (query_size * (c * (1 + theta) * g)) @ key_size.swapaxes(-1, -2)
        query_floor = fmt.underflow_error() + 2 * arithmetic.floor
        r += (1 + g) * query_floor * key_size.sum(axis=-1)[:, None, :] + score_floor
    else:
        factor = c * (1 + theta) * (1 + u)
        r = (query_size * (factor * g)) @ key_size.swapaxes(-1, -2)
        r += magnitude * (u * (1 + theta))
        r += factor * score_floor + arithmetic.floor

    seen_t = t if everything else np.where(visible, t, -np.inf)
    peak = seen_t.max(axis=-1)
    seen = peak > -np.inf
    peak = np.where(seen, peak, 0.0)
    gap = peak[..., None] - t
    if not everything:
        gap *= visible
        r *= visible
    weight = np.exp2(seen_t - peak[..., None])
    total = np.where(seen, weight.sum(axis=-1), 1.0)
    weight /= total[..., None]
    # A constant that may have been flushed says nothing about the order of the logits.
    uncertainty = r / (1 - theta) if theta < 0.5 else np.full_like(r, 1e300)
    way = path(t, uncertainty, visible, tiles, _step(arithmetic))

    # (3) A factor common to all logits acts through the gap only; differences telescope.
    tau = theta * gap
    tau += r
    tau_max = tau.max(axis=-1)[..., None]
    systematic = -math.log1p(-model.exp2_error) * way.exps
    if model.merge == "lse":
        systematic = systematic + _stored_lse(gap, magnitude, peak, tau_max, arithmetic, way)
    exponent = gap * (LN_2 * u)
    exponent += tau * (LN_2 * (1 + u))
    exponent += (LN_2 * u * (3 if model.contraction else 1)) * tau_max
    exponent += systematic
    deviation = expm1_bound(exponent)
    shift = theta * np.abs(peak)
    reach = shift + tau_max[..., 0]
    shared = deviation
    if arithmetic.confidence is not None:
        shared = np.minimum(expm1_bound(LN_2 * theta * gap + systematic), deviation)
    return Weights(visible, weight, gap, peak, total, exponent, deviation, shared, shift, reach, way)


def _step(arithmetic: Arithmetic) -> int:
    return arithmetic.products_per_step if arithmetic.fused else 1


def _stored_lse(
    gap: Float64Array,
    magnitude: Float64Array,
    peak: Float64Array,
    tau_max: Float64Array,
    arithmetic: Arithmetic,
    way: Path,
) -> Float64Array:
    """(8) What merging through stored log-sum-exps adds to the exponent; it is not shift invariant."""
    model, u = arithmetic.model, arithmetic.u
    spread = np.log2(np.maximum(way.split_keys * way.splits, 1))[..., None]
    level = np.maximum(magnitude, np.abs(peak)[..., None]) + spread + tau_max + 1
    octaves = 3 * u * level + u * (gap + spread + tau_max) + model.log2_error * (1 + spread)
    row_sum = -np.log1p(-np.minimum(arithmetic.row_sum(way), 0.5))[..., None]
    added: Float64Array = LN_2 * octaves + row_sum
    return np.where((way.splits > 1)[..., None], added, 0.0)


def p_rounding(weights: Weights, arithmetic: Arithmetic) -> Float64Array | float:
    """(4) Relative error of rounding the weight of each key to P's format, underflow included.

    P is rounded relative to a running maximum that is not above the final one, so it is at least 2**-gap;
    what rounds to zero errs by itself and no more.
    """
    if not arithmetic.rounds_p:
        return 0.0
    fmt, mode = arithmetic.model.format_of_p(arithmetic.fmt), arithmetic.model.p_rounding
    relative = fmt.unit_roundoff(mode)
    if weights.gap.size == 0 or weights.gap.max() < -fmt.emin:
        return relative
    with np.errstate(over="ignore"):
        absolute = fmt.underflow_error(mode) * np.exp2(weights.gap)
    return np.clip(absolute, relative, 1.0)
