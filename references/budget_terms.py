"""The terms of the error budget of outputs and log-sum-exps, (4) to (9) of docs/numerics.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.alarm import ByGap, independent_errors, independent_norm
from references.centred import Centred
from references.rounding import Format
from references.rounding_errors import Arithmetic
from references.softmax import LN_2, Magnitudes, Sequences, Softmax, lifted_magnitude
from references.tiling import Counts
from references.weight_errors import Deviations, column, p_rounding

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

TERMS = ("logit", "P", "accumulation", "sum", "underflow", "division", "output rounding", "oracle")
LSE_TERMS = ("logit", "P", "sum", "underflow", "logarithm", "rounding", "oracle")

_EXPONENT_FIELD = 0x7FF << 52


def _half_ulp(magnitude: Float64Array, fmt: Format, arithmetic: Arithmetic, out: Float64Array) -> None:
    """(7) Largest error of rounding a finite value of at most this magnitude to the output format."""
    nearest = arithmetic.model.output_rounding == "nearest"
    # The power of two that a float64 begins with is its exponent field.
    np.bitwise_and(magnitude.view(np.int64), _EXPONENT_FIELD, out=out.view(np.int64))
    np.maximum(out, 2.0**fmt.emin, out=out)
    out *= 2.0 ** ((0 if nearest else 1) - fmt.precision)


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
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Sections (4) to (7), for finite values: [terms, num_kv_heads, rows, head_dim], their total, and sum w phi.

    The last term, of the oracle, is not filled in.
    """
    model, fmt = arithmetic.model, arithmetic.fmt
    exact, sizes, seen, size = problem.exact, problem.sizes, problem.seen, problem.size

    p_error = p_rounding(exact, arithmetic)
    g = arithmetic.accumulation(seen, deviations.rescaling)
    if arithmetic.partial:
        g = (1 + g) * (1 + np.where(np.asarray(seen.splits) > 1, arithmetic.partial, 0.0)) - 1
    lam = deviations.row_sum

    # 1 + phi of a key: of all its row, or where that is too much it is multiplied into the powers.
    power, linear, slope = exact.power, deviations.linear, deviations.slope
    growth = 1 + deviations.largest * (1 + 0.501 * deviations.largest)
    if model.row_sum_from_p:  # then the rounding of P is common to numerator and denominator
        linear = (1 + deviations.phi()) * (1 + p_error) - 1
        p_error, slope, growth = 0.0, np.ones_like(slope), np.ones_like(growth)
        power = power * (1 + linear)
    elif deviations.wide is not None:
        power = power.copy()
        power[deviations.wide] *= 1 + linear[deviations.wide]
        growth[deviations.wide] = 1.0
    # phi is needed again where it is not linear, and by the alarm.
    again = model.row_sum_from_p or deviations.wide is not None or keys is not None
    share = np.multiply(exact.power, linear, out=None if again else linear)
    shares = np.add.reduce(share, axis=-1)
    part = slope / exact.total
    share_sum = shares * part
    mass = 1 + share_sum
    weights = [power] if isinstance(p_error, float) else [power, power * p_error]
    sums = problem.sequences.sums
    magnitudes = sums(sizes.value, *weights)
    lifted = magnitudes if sizes.lifted_value is sizes.value else sums(sizes.lifted_value, *weights)

    # (5) What underflow can lose, before the division by the total of the weights.
    operations = (2 * seen.keys + 4 * seen.tiles * seen.splits + 2) * arithmetic.floor
    lost_sum = 2 * arithmetic.exp2_floor * seen.keys + operations

    def lost(factor: Float64Array) -> Float64Array:
        """Of the numerators, times a factor of the row."""
        of_values = problem.sequences.times(sizes.all_values, 2 * arithmetic.exp2_floor * factor)
        of_values += column(operations * factor)
        return of_values

    # (6)
    denominator = 1 - share_sum - lam * mass - lost_sum / exact.total
    usable = None if denominator.min() > 0 else denominator > 0
    inverse = 1 / (denominator if usable is None else np.where(usable, denominator, 1.0))
    inverse_total = inverse / exact.total
    grown = growth * inverse_total
    terms = np.empty((len(TERMS), *size.shape))
    if isinstance(p_error, float):
        np.multiply(magnitudes[0], column(grown * p_error), out=terms[1])
        np.multiply(lifted[0], column(grown * (1 + p_error) * g), out=terms[2])
    else:
        np.multiply(magnitudes[1], column(grown), out=terms[1])
        np.add(lifted[0], lifted[1], out=terms[2])
        terms[2] *= column(grown * g)
    score_rss: Float64Array | None = None
    confidence = arithmetic.confidence
    if confidence is not None and keys is not None and deviations.shared is not None:
        weight = exact.weight()
        own = weight * (deviations.phi() - deviations.shared)
        rounded = power * p_error
        rounded *= column(growth / exact.total)
        score_rss, p_rss = independent_errors(keys, own, rounded, p_error, problem.sequences, problem.out)
        score_rss *= confidence
        if model.p_rounding == "nearest":
            p_rss *= column(confidence * inverse)
            np.minimum(terms[1], p_rss, out=terms[1])
    np.multiply(size, column(lam * mass * inverse), out=terms[3])
    np.multiply(size, column(lost_sum * inverse_total), out=terms[4])
    terms[4] += lost(inverse_total)

    def others() -> Float64Array:
        """What the terms add up to without the first."""
        rest: Float64Array = np.add.reduce(terms[1:5])
        return rest

    problem.centred(share, shares, part * inverse, others, out=terms[0])
    if score_rss is not None and deviations.shared is not None and not model.row_sum_from_p:
        common = weight * deviations.shared
        likely = problem.centred(common, np.add.reduce(common, axis=-1), inverse, others)
        score_rss *= column(inverse)
        likely += score_rss
        np.minimum(terms[0], likely, out=terms[0])
    if usable is not None or share_sum.max() > 0.125:
        doubtful = ~(denominator > 0) | (share_sum > 0.125)
        distance, largest = _hull(problem.sequences, problem.out, doubtful)
        largest = lifted_magnitude(largest, fmt, arithmetic.fused)
        worst_p = p_error if isinstance(p_error, float) else p_error.max(axis=-1)
        psi = (1 + worst_p) * (1 + g) - 1
        # The largest computed weight is 1; with contraction it is within the rounding of its logit.
        reach = deviations.reach if model.contraction else 0.0
        at_least = np.exp2(-np.minimum(reach, 1000.0)) * np.maximum(1 - lam, 0.0)
        with np.errstate(divide="ignore"):
            cap = distance + column((psi + lam) / np.maximum(1 - lam, 0.0)) * largest
            cap = cap + (lost(np.ones_like(inverse)) + column(lost_sum) * largest) / column(at_least)
        linear_sum = np.where(column(denominator) > 0, np.add.reduce(terms[:5]), np.inf)
        capped = doubtful[..., None] & ~(linear_sum <= cap)
        terms[0, capped] = cap[capped]
        terms[1:5, capped] = 0.0

    # (7)
    total = np.add.reduce(terms[:4])
    before_division = total + terms[4]
    before_division += size
    terms[4] += arithmetic.floor
    total += terms[4]
    np.multiply(before_division, model.division_error, out=terms[5])
    total += terms[5]
    if fmt.precision < model.work.precision:
        before_division *= 1 + model.division_error
        before_division += arithmetic.floor
        _half_ulp(before_division, fmt, arithmetic, terms[6])
        total += terms[6]
    else:
        terms[6] = 0.0
    return terms, total, share_sum


def _log_mean_exp(exact: Softmax, exponent: Float64Array) -> Float64Array:
    """log sum_j w_j 2**exponent_j for exponents >= 0, also where exp2 overflows and w underflows."""
    logs = LN_2 * (exponent + exact.gap) - column(np.log(exact.total))
    if exact.hidden is not None:
        np.copyto(logs, -np.inf, where=exact.hidden)
    top = logs.max(axis=-1)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total: Float64Array = top + np.log(np.exp(logs - column(top)).sum(axis=-1))
    small = np.log1p(np.add.reduce(exact.weight() * np.expm1(LN_2 * np.minimum(exponent, 1.0)), axis=-1))
    return np.where(exponent.max(axis=-1) < 0.5, small, np.maximum(total, 0.0))


def lse_terms(
    problem: Problem,
    deviations: Deviations,
    share_sum: Float64Array,
    arithmetic: Arithmetic,
    keys: ByGap | None = None,
) -> tuple[Float64Array, Float64Array]:
    """(9) Budget of the log-sum-exp, [terms, num_kv_heads, rows], and its total; a float32 whatever the input format.

    The last term, of the oracle, is not filled in.
    """
    model, u, exact, seen = arithmetic.model, arithmetic.u, problem.exact, problem.seen
    log_total = np.log(exact.total)
    if model.row_sum_from_p:
        logit = _log_mean_exp(exact, deviations.exponent)
    else:
        logit = np.log1p(share_sum)
        if deviations.wide is not None and not deviations.largest.max() < 0.5:
            logit = np.where(deviations.largest < 0.5, logit, _log_mean_exp(exact, deviations.exponent))
    if arithmetic.confidence is not None and keys is not None and deviations.shared is not None:
        weight, phi = exact.weight(), deviations.phi()
        own = weight * (phi - deviations.shared)
        common = np.add.reduce(weight * deviations.shared, axis=-1)
        second_order = np.add.reduce(weight * phi**2, axis=-1)
        independent = arithmetic.confidence * independent_norm(keys, own)
        logit = np.fmin(logit, common + independent + second_order)
    terms = np.zeros((len(LSE_TERMS), *logit.shape))
    np.add(LN_2 * deviations.shift, logit, out=terms[0])
    if model.row_sum_from_p:
        p_error = np.log1p(np.broadcast_to(p_rounding(exact, arithmetic), exact.gap.shape)) / LN_2
        terms[1] = np.maximum(_log_mean_exp(exact, deviations.exponent + p_error) - logit, 0.0)
    terms[2] = -np.log1p(-np.minimum(deviations.row_sum, 0.5))
    operations = 2 * seen.keys + 4 * seen.tiles * seen.splits + 2
    terms[3] = 2 * (2 * arithmetic.exp2_floor * seen.keys + operations * arithmetic.floor)
    error = np.add.reduce(terms[:4])
    terms[4] = model.log2_error * (LN_2 + log_total + error)
    level = LN_2 * (np.abs(exact.peak) + deviations.reach) + log_total + error + terms[4]
    terms[5] = 4 * u * (1 + 4 * u) * level + arithmetic.floor
    error += terms[4]
    error += terms[5]
    return terms, error
