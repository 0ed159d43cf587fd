"""The terms of the error budget of outputs and log-sum-exps, (4) to (9) of docs/numerics.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.alarm import Alike, Independent
from references.centred import Centred
from references.rounding import Format
from references.rounding_errors import Arithmetic
from references.shares import Shares, Sums
from references.softmax import LN_2, Sequences, Softmax, lifted_magnitude
from references.tiling import Counts, Layout
from references.weight_errors import Deviations, column, p_rounding

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

TERMS = ("logit", "P", "accumulation", "sum", "underflow", "division", "output rounding", "oracle")
LSE_TERMS = ("logit", "P", "sum", "underflow", "logarithm", "rounding", "oracle")

# By how much of itself the alarm must be able to be less for independent errors to be looked at.
NOTICED = 2.0**-20

_EXPONENT_FIELD = 0x7FF << 52


def half_ulp(magnitude: Float64Array, fmt: Format, arithmetic: Arithmetic, out: Float64Array) -> None:
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
        count = visible.sum(axis=-1)
        if np.array_equal(visible, np.arange(visible.shape[-1]) < count[:, None]):
            for end, ufunc in ((high, np.maximum), (low, np.minimum)):
                end[:, mine] = ufunc.accumulate(value, axis=-2)[:, count - 1]
            continue
        for row in np.flatnonzero(chosen[mine] & visible.any(axis=-1)):
            seen = value[:, visible[row]]
            high[:, mine.start + row], low[:, mine.start + row] = seen.max(axis=-2), seen.min(axis=-2)
    return np.maximum(high - out, out - low), np.maximum(np.abs(high), np.abs(low))


@dataclass(frozen=True)
class Problem:
    """What the gate and the alarm have in common."""

    sequences: Sequences
    tiles: list[Layout]
    exact: Softmax
    out: Float64Array  # exact
    size: Float64Array  # its magnitude
    centred: Centred
    seen: Counts


@dataclass(frozen=True)
class Likely:
    """What the alarm knows of errors that are independent from key to key."""

    independent: Independent
    alike: Alike


def out_terms(
    problem: Problem,
    deviations: Deviations,
    shares: Shares,
    sums: Sums,
    arithmetic: Arithmetic,
    likely: Likely | None = None,
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Sections (4) to (7), for finite values: [terms, num_kv_heads, rows, head_dim], their total, and sum w phi.

    The last term, of the oracle, is not filled in.
    """
    model, fmt = arithmetic.model, arithmetic.fmt
    exact, seen, size = problem.exact, problem.seen, problem.size

    g = arithmetic.accumulation(seen, deviations.rescaling)
    several = np.asarray(seen.splits) > 1
    if arithmetic.partial:
        g = (1 + g) * (1 + np.where(several, arithmetic.partial, 0.0)) - 1
    lam, p_error = deviations.row_sum, shares.p_error
    share_sum = shares.total * shares.part
    mass = 1 + share_sum

    # (5) What underflow can lose, before the division by the total of the weights.
    operations, lost_sum = arithmetic.lost_by_operations(seen), arithmetic.lost_sum(seen)

    def lost(factor: Float64Array) -> Float64Array:
        """Of the numerators, times a factor of the row."""
        of_values = sums.of_all(problem.sequences, 2 * arithmetic.exp2_floor * factor)
        of_values += column(operations * factor)
        return of_values

    # (6)
    denominator = 1 - share_sum - lam * mass - lost_sum / exact.total
    usable = None if denominator.min() > 0 else denominator > 0
    inverse = 1 / (denominator if usable is None else np.where(usable, denominator, 1.0))
    inverse_total = inverse / exact.total
    grown = shares.growth * inverse_total
    terms = np.empty((len(TERMS), *size.shape))
    p_factor = column(grown * shares.rounded()[1])
    np.multiply(sums.sizes[-1], p_factor, out=terms[1])
    if isinstance(p_error, float):
        np.multiply(sums.lifted[0], column(grown * (1 + p_error) * g), out=terms[2])
    else:
        np.add(sums.lifted[0], sums.lifted[1], out=terms[2])
        terms[2] *= column(grown * g)
    np.multiply(size, column(lam * mass * inverse), out=terms[3])
    np.multiply(size, column(lost_sum * inverse_total), out=terms[4])
    terms[4] += lost(inverse_total)

    def others() -> Float64Array:
        """What the terms add up to without the first."""
        rest: Float64Array = np.add.reduce(terms[1:5])
        return rest

    problem.centred.mean(
        shares.of_distances, sums.moments[0], shares.total, shares.part * inverse, others, out=terms[0]
    )
    if likely is not None and not model.row_sum_from_p:
        _likely_terms(terms, problem, shares, sums, arithmetic, likely, inverse, p_factor, others)
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
    if arithmetic.partial_floor:
        terms[4] += column(np.where(several, arithmetic.partial_floor, 0.0) * (1 + g) / (1 - np.minimum(lam, 0.5)))
    total += terms[4]
    np.multiply(before_division, model.division_error, out=terms[5])
    total += terms[5]
    if fmt.precision < model.work.precision:
        before_division *= 1 + model.division_error
        before_division += arithmetic.floor
        half_ulp(before_division, fmt, arithmetic, terms[6])
        total += terms[6]
    else:
        terms[6] = 0.0
    return terms, total, share_sum


def _likely_terms(
    terms: Float64Array,
    problem: Problem,
    shares: Shares,
    sums: Sums,
    arithmetic: Arithmetic,
    likely: Likely,
    inverse: Float64Array,
    p_factor: Float64Array,
    others: Callable[[], Float64Array],
) -> None:
    """Take roots of sums of squares for the terms of logits and of P where that is less.

    What keys that err alike add to a sum of squares is asked for only where it could matter.
    """
    independent, alike, confidence = likely.independent, likely.alike, arithmetic.confidence
    assert confidence is not None
    common, (first, second) = independent.common, sums.moments[2]
    of_common = problem.centred.mean(common, sums.moments[1], independent.common_mass, inverse, others)
    own_mass = independent.square_mass
    logits = problem.centred(independent.square, (first, second), own_mass, confidence * inverse, others)
    noticed = terms[0] - NOTICED * (terms[0] + others())
    matters = (of_common + logits < noticed).any(axis=-1)
    tied = matters & alike.tied
    if tied.any():
        excess = alike.excess(independent.own, tied, centre=problem.out)
        logits = np.sqrt(logits * logits + column((confidence * inverse) ** 2) * excess)
    logits += of_common
    np.copyto(terms[0], logits, where=matters[..., None] & (logits < terms[0]))

    if sums.rounded is not None:
        factor = confidence * p_factor
        rounding = factor * np.sqrt(sums.rounded)
        matters = (rounding < terms[1] - NOTICED * (terms[0] + others())).any(axis=-1)
        if matters.any():
            excess = alike.excess(
                shares.rounded()[0], matters, p_error=float(np.min(shares.p_error)), more_than=confidence**2
            )
            rounding = np.sqrt(rounding * rounding + factor**2 * excess)
            np.copyto(terms[1], rounding, where=matters[..., None] & (rounding < terms[1]))


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
    likely: Likely | None = None,
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
    if likely is not None and arithmetic.confidence is not None:
        independent, confidence = likely.independent, arithmetic.confidence
        linear = independent.common_mass + independent.second_order
        squares = independent.square_mass.copy()
        matters = linear + confidence * np.sqrt(squares) < (1 - NOTICED) * logit
        tied = matters & likely.alike.tied
        if tied.any():
            squares += likely.alike.excess_of_sums(independent.own, tied, more_than=confidence**2)
        logit = np.where(matters, np.fmin(logit, linear + confidence * np.sqrt(squares)), logit)
    terms = np.zeros((len(LSE_TERMS), *logit.shape))
    np.add(LN_2 * deviations.shift, logit, out=terms[0])
    if model.row_sum_from_p:
        p_error = np.log1p(np.broadcast_to(p_rounding(exact, arithmetic), exact.gap.shape)) / LN_2
        terms[1] = np.maximum(_log_mean_exp(exact, deviations.exponent + p_error) - logit, 0.0)
    terms[2] = -np.log1p(-np.minimum(deviations.row_sum, 0.5))
    terms[3] = 2 * arithmetic.lost_sum(seen)
    error = np.add.reduce(terms[:4])
    terms[4] = model.log2_error * (LN_2 + log_total + error)
    level = LN_2 * (np.abs(exact.peak) + deviations.reach) + log_total + error + terms[4]
    terms[5] = 4 * u * (1 + 4 * u) * level + arithmetic.floor
    error += terms[4]
    error += terms[5]
    return terms, error
