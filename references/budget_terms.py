"""The terms of the error budget of outputs and log-sum-exps, (4) to (9) of docs/numerics.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.alarm import ByGap, independent_errors, independent_norm
from references.centred import CANCELLATION_SHARE, Centred
from references.rounding import Format
from references.rounding_errors import Arithmetic, expm1_bound
from references.softmax import LN_2, Magnitudes, Sequences, Softmax, lifted_magnitude
from references.tiling import Counts
from references.weight_errors import Deviations, column, p_rounding

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

TERMS = ("logit", "P", "accumulation", "sum", "underflow", "division", "output rounding", "oracle")
LSE_TERMS = ("logit", "P", "sum", "underflow", "logarithm", "rounding", "oracle")


def _half_ulp(magnitude: Float64Array, fmt: Format, arithmetic: Arithmetic) -> Float64Array:
    """(7) Largest error of rounding a finite value of at most this magnitude to the output format."""
    nearest = arithmetic.model.output_rounding == "nearest"
    # The exponent field of a float64; several times as fast as frexp and ldexp.
    field = magnitude.view(np.int64) >> 52
    np.maximum(field, fmt.emin + 1023, out=field)
    field += (0 if nearest else 1) - fmt.precision
    field <<= 52
    return field.view(np.float64)


def _hull(sequences: Sequences, out: Float64Array, rows: BoolArray) -> tuple[Float64Array, Float64Array]:
    """(6) Distance of ``out`` from the ends of the range of visible values, and their largest magnitude."""
    high, low = np.zeros_like(out), np.zeros_like(out)
    chosen: BoolArray = np.asarray(rows.any(axis=0))
    for mine, keys, visible in zip(sequences.rows, sequences.keys, sequences.visible, strict=True):
        if not chosen[mine].any():
            continue
        value = sequences.value[:, keys]
        if visible.all():
            high[:, mine], low[:, mine] = (end(axis=-2, keepdims=True) for end in (value.max, value.min))
            continue
        for row in np.flatnonzero(chosen[mine] & visible.any(axis=-1)):
            seen = value[:, visible[row]]
            high[:, mine.start + row], low[:, mine.start + row] = seen.max(axis=-2), seen.min(axis=-2)
    return np.maximum(high - out, out - low), np.maximum(np.abs(high), np.abs(low))


@dataclass(frozen=True)
class Problem:
    """What the gate and the alarm have in common."""

    sequences: Sequences
    exact: Softmax
    sizes: Magnitudes
    out: Float64Array  # exact
    size: Float64Array  # its magnitude
    centred: Centred
    seen: Counts


def out_terms(
    problem: Problem, deviations: Deviations, arithmetic: Arithmetic, keys: ByGap | None = None
) -> tuple[Float64Array, Float64Array]:
    """Sections (4) to (7), for finite values: [terms, num_kv_heads, rows, head_dim], and sum w phi."""
    model, fmt = arithmetic.model, arithmetic.fmt
    exact, sizes, seen, size = problem.exact, problem.sizes, problem.seen, problem.size

    phi = deviations.phi
    p_error = p_rounding(exact, arithmetic)
    if model.row_sum_from_p:  # then the rounding of P is common to numerator and denominator
        phi = (1 + phi) * (1 + p_error) - 1
        p_error = 0.0
    g = arithmetic.accumulation(seen, deviations.rescaling)
    if arithmetic.partial:
        g = (1 + g) * (1 + np.where(np.asarray(seen.splits) > 1, arithmetic.partial, 0.0)) - 1
    g, lam = column(g), column(deviations.row_sum)

    share = exact.weight * phi
    share_sum = share.sum(axis=-1)[..., None]
    grown = exact.weight + share
    mass = 1 + share_sum
    weights = [grown] if isinstance(p_error, float) else [grown, grown * p_error]
    sums = problem.sequences.sums
    magnitudes = sums(sizes.value, *weights)
    lifted = magnitudes if sizes.lifted_value is sizes.value else sums(sizes.lifted_value, *weights)
    if isinstance(p_error, float):
        rounding, aligned = magnitudes[0] * p_error, lifted[0] * (1 + p_error)
    else:
        rounding, aligned = magnitudes[1], lifted[0] + lifted[1]
    score_rss: Float64Array | None = None
    confidence = arithmetic.confidence
    if confidence is not None and keys is not None:
        own = exact.weight * (deviations.phi - deviations.shared)
        rounded = grown * p_error
        score_rss, p_rss = independent_errors(keys, own, rounded, p_error, problem.sequences, problem.out)
        if model.p_rounding == "nearest":
            rounding = np.minimum(rounding, confidence * p_rss)

    # (5) What underflow can lose, before the division by the total of the weights.
    operations = (2 * seen.keys + 4 * seen.tiles * seen.splits + 2) * arithmetic.floor
    lost_sum = column(2 * arithmetic.exp2_floor * seen.keys + operations)
    lost = problem.sequences.of_rows((2 * arithmetic.exp2_floor) * sizes.all_values) + column(operations)

    # (6)
    total = exact.total[..., None]
    denominator = 1 - share_sum - lam * mass - lost_sum / total
    usable = None if denominator.min() > 0 else denominator > 0
    inverse = 1 / (denominator if usable is None else np.where(usable, denominator, 1.0))
    terms = np.empty((len(TERMS), *size.shape))
    np.multiply(rounding, inverse, out=terms[1])
    np.multiply(aligned, g * inverse, out=terms[2])
    np.multiply(size, lam * mass * inverse, out=terms[3])
    inverse_total = inverse / total
    np.multiply(size, lost_sum * inverse_total, out=terms[4])
    terms[4] += lost * inverse_total
    others = np.add.reduce(terms[1:5])
    tolerance = others * (CANCELLATION_SHARE / inverse)
    logit = problem.centred(share, share_sum, tolerance)
    if score_rss is not None and confidence is not None and not model.row_sum_from_p:
        common = exact.weight * deviations.shared
        shared = problem.centred(common, common.sum(axis=-1)[..., None], tolerance)
        logit = np.minimum(logit, shared + confidence * score_rss)
    np.multiply(logit, inverse, out=terms[0])
    if usable is not None or share_sum.max() > 0.125:
        doubtful = (~(denominator > 0) | (share_sum > 0.125))[..., 0]
        distance, largest = _hull(problem.sequences, problem.out, doubtful)
        largest = lifted_magnitude(largest, fmt, arithmetic.fused)
        worst_p = p_error if isinstance(p_error, float) else p_error.max(axis=-1)[..., None]
        psi = (1 + worst_p) * (1 + g) - 1
        # The largest computed weight is 1; with contraction it is within the rounding of its logit.
        reach = deviations.reach[..., None] if model.contraction else 0.0
        at_least = np.exp2(-np.minimum(reach, 1000.0)) * np.maximum(1 - lam, 0.0)
        with np.errstate(divide="ignore"):
            cap = distance + (psi + lam) / np.maximum(1 - lam, 0.0) * largest
            cap = cap + (lost + lost_sum * largest) / at_least
        linear = np.where(denominator > 0, np.add.reduce(terms[:5]), np.inf)
        capped = doubtful[..., None] & ~(linear <= cap)
        terms[0, capped] = cap[capped]
        terms[1:5, capped] = 0.0
        others[capped] = 0.0

    # (7)
    before_division = others
    before_division += terms[0]
    before_division += size
    terms[4] += arithmetic.floor
    np.multiply(before_division, model.division_error, out=terms[5])
    if fmt.precision < model.work.precision:
        before_division *= 1 + model.division_error
        before_division += arithmetic.floor
        terms[6] = _half_ulp(before_division, fmt, arithmetic)
    else:
        terms[6] = 0.0
    return terms, share_sum[..., 0]


def _log_mean_exp(exact: Softmax, exponent: Float64Array) -> Float64Array:
    """log sum_j w_j exp(exponent_j) for exponents >= 0, also where exp overflows and w underflows."""
    if exponent.max(initial=0.0) < 0.5:
        result: Float64Array = np.log1p((exact.weight * expm1_bound(exponent, 0.5)).sum(axis=-1))
        return result
    logs = exponent - LN_2 * exact.gap - np.log(exact.total)[..., None]
    if exact.hidden is not None:
        np.copyto(logs, -np.inf, where=exact.hidden)
    top = logs.max(axis=-1)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total: Float64Array = top + np.log(np.exp(logs - top[..., None]).sum(axis=-1))
    return np.maximum(total, 0.0)


def lse_terms(
    problem: Problem,
    deviations: Deviations,
    share_sum: Float64Array,
    arithmetic: Arithmetic,
    keys: ByGap | None = None,
) -> Float64Array:
    """(9) Budget of the log-sum-exp, [terms, num_kv_heads, rows]; a float32 whatever the input format."""
    model, u, exact, seen = arithmetic.model, arithmetic.u, problem.exact, problem.seen
    log_total = np.log(exact.total)
    small = deviations.largest < 0.5 and not model.row_sum_from_p
    logit = np.log1p(share_sum) if small else _log_mean_exp(exact, deviations.exponent)
    if arithmetic.confidence is not None and keys is not None:
        own = exact.weight * (deviations.phi - deviations.shared)
        common = (exact.weight * deviations.shared).sum(axis=-1)
        second_order = (exact.weight * deviations.phi**2).sum(axis=-1)
        independent = arithmetic.confidence * independent_norm(keys, own)
        logit = np.fmin(logit, common + independent + second_order)
    terms = np.zeros((len(LSE_TERMS), *logit.shape))
    np.add(LN_2 * deviations.shift, logit, out=terms[0])
    if model.row_sum_from_p:
        p_error = np.log1p(np.broadcast_to(p_rounding(exact, arithmetic), exact.gap.shape))
        terms[1] = np.maximum(_log_mean_exp(exact, deviations.exponent + p_error) - logit, 0.0)
    terms[2] = -np.log1p(-np.minimum(deviations.row_sum, 0.5))
    operations = 2 * seen.keys + 4 * seen.tiles * seen.splits + 2
    terms[3] = 2 * (2 * arithmetic.exp2_floor * seen.keys + operations * arithmetic.floor)
    error = np.add.reduce(terms[:4])
    terms[4] = model.log2_error * (LN_2 + log_total + error)
    level = LN_2 * (np.abs(exact.peak) + deviations.reach) + log_total + error + terms[4]
    terms[5] = 4 * u * (1 + 4 * u) * level + arithmetic.floor
    return terms
