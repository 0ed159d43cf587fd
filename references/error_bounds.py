"""How far a correct kernel may be from the exact result: one number for every output element.

The derivation, term by term, is in docs/numerics.md; the equation numbers below are those of its sections.
Everything is a bound, nothing is an estimate, and no higher-order part is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.alarm import grouped_norm, independent_errors
from references.arithmetic_model import ArithmeticModel
from references.overflow import non_finite
from references.overflow import overflow_free as overflow_free
from references.rounding import Format, as_format
from references.rounding_errors import Arithmetic, expm1_bound
from references.tiling import Tiles
from references.tiling import tiling as tiling
from references.weight_errors import LN_2, Weights, lifted_magnitude, p_rounding, weights_of

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# The oracle's own error, as a share of the budget; tests/test_reference_trust.py asserts that it is.
ORACLE_SHARE = 2.0**-20

TERMS = ("logit", "P", "accumulation", "sum", "underflow", "division", "output rounding", "oracle")
LSE_TERMS = ("logit", "P", "sum", "underflow", "logarithm", "rounding", "oracle")


@dataclass(frozen=True)
class Budget:
    """Error budgets and what they consist of.

    A budget of 0 is met by the exact value only. NaN means that there is no bound, because a non-finite input
    is visible or the logits overflow even float64.

    Attributes:
        out: [num_q_heads, q_len, head_dim]
        lse: [num_q_heads, q_len]
        terms: by name, arrays like ``out`` that add up to it.
        lse_terms: by name, arrays like ``lse`` that add up to it.
    """

    out: Float64Array
    lse: Float64Array
    terms: dict[str, Float64Array]
    lse_terms: dict[str, Float64Array]


def _half_ulp(magnitude: Float64Array, fmt: Format, arithmetic: Arithmetic) -> Float64Array:
    """(7) Largest error of rounding a value of at most this magnitude to the output format."""
    if fmt.precision >= arithmetic.model.work.precision:
        return np.zeros_like(magnitude)
    # The exponent field of a float64; twice as fast as frexp and ldexp.
    exponent = np.maximum((magnitude.view(np.int64) >> 52) - 1023, fmt.emin)
    nearest = arithmetic.model.output_rounding == "nearest"
    field = exponent - fmt.precision + (0 if nearest else 1) + 1023
    return np.where(np.isfinite(magnitude), (field << 52).view(np.float64), np.inf)


def _hull(
    value: Float64Array, visible: BoolArray, out: Float64Array, rows: NDArray[np.bool_]
) -> tuple[Float64Array, Float64Array]:
    """(6) Distance of ``out`` from the ends of the range of visible values, and their largest magnitude."""
    distance, largest = np.zeros_like(out), np.zeros_like(out)
    for h, row in zip(*np.nonzero(rows), strict=True):
        seen = value[h, visible[row]]
        high, low = seen.max(axis=0), seen.min(axis=0)
        distance[h, row] = np.maximum(high - out[h, row], out[h, row] - low)
        largest[h, row] = np.maximum(np.abs(high), np.abs(low))
    return distance, largest


def _centred(weights: Weights, deviation: Float64Array, value: Float64Array, out: Float64Array) -> Float64Array:
    """At least sum_j w_j phi_j |v_j - o|: its root-mean-square form, which is three matrix products."""
    share = weights.weight * deviation
    mass = share.sum(axis=-1)[..., None]
    first, second = share @ value, share @ (value * value)
    size = np.abs(out)
    spread = second - 2 * out * first + out * out * mass
    # What float64 may have lost in the three sums and in their cancellation.
    noise = (value.shape[-2] + 8) * 2.0**-52 * (second + 2 * size * np.abs(first) + out * out * mass)
    bound: Float64Array = np.sqrt(mass * (np.maximum(spread, 0.0) + noise))
    return bound


def _out_terms(
    weights: Weights, value: Float64Array, out: Float64Array, arithmetic: Arithmetic
) -> dict[str, Float64Array]:
    """Sections (4) to (7), for rows that see a key and finite values."""
    model, fmt, way = arithmetic.model, arithmetic.fmt, weights.way
    size = np.abs(out)
    magnitude = np.abs(value)
    lifted = lifted_magnitude(value, fmt, True) if arithmetic.fused else magnitude
    same = lifted is magnitude or bool(np.array_equal(lifted, magnitude))

    deviation = weights.deviation
    p_error = p_rounding(weights, arithmetic)
    if model.row_sum_from_p:  # then the rounding of P is common to numerator and denominator
        deviation = (1 + deviation) * (1 + p_error) - 1
        p_error = 0.0
    g = arithmetic.accumulation(way)
    partial = np.where(way.splits > 1, partial_error(arithmetic), 0.0)
    g = ((1 + g) * (1 + partial) - 1)[..., None]
    lam = arithmetic.row_sum(way)[..., None]

    grown = weights.weight * (1 + deviation)
    mass = grown.sum(axis=-1)[..., None]
    plain = grown @ magnitude
    p_plain = p_error * plain if isinstance(p_error, float) else (grown * p_error) @ magnitude
    aligned = plain + p_plain if same else (grown * (1 + p_error)) @ lifted

    logit = _centred(weights, deviation, value, out)
    rounding = p_plain
    if arithmetic.confidence is not None:
        shared = _centred(weights, weights.shared, value, out)
        score_rss, p_rss = independent_errors(weights, value, out, p_error)
        if not model.row_sum_from_p:
            logit = np.minimum(logit, shared + arithmetic.confidence * score_rss)
        if model.p_rounding == "nearest":
            rounding = np.minimum(rounding, arithmetic.confidence * p_rss)

    # (5) What underflow can lose, before the division by the total of the weights.
    count = weights.visible.sum(axis=-1)[:, None]
    operations = 2 * count + 4 * (way.tiles * way.splits)[..., None] + 2
    lost = 2 * arithmetic.exp2_floor * magnitude.sum(axis=-2)[:, None, :]
    lost = lost + operations * arithmetic.floor
    lost_sum = 2 * arithmetic.exp2_floor * count + operations * arithmetic.floor
    total = weights.total[..., None]

    # (6)
    share = (weights.weight * deviation).sum(axis=-1)[..., None]
    denominator = 1 - share - lam * mass - lost_sum / total
    usable = denominator > 0
    divisor = np.where(usable, denominator, 1.0)
    with np.errstate(invalid="ignore"):
        terms = {
            "logit": logit / divisor,
            "P": rounding / divisor,
            "accumulation": g * aligned / divisor,
            "sum": lam * mass * size / divisor,
            "underflow": (lost + lost_sum * size) / total / divisor,
        }
    doubtful = (~usable | (share > 0.125))[..., 0] & (way.splits > 0)
    if doubtful.any():
        distance, largest = _hull(value, weights.visible, out, doubtful)
        if not same:
            largest = np.where(largest > 0, np.maximum(largest, fmt.smallest_normal), 0.0)
        worst_p = p_error if isinstance(p_error, float) else p_error.max(axis=-1)[..., None]
        psi = (1 + worst_p) * (1 + g) - 1
        # The largest computed weight is 1; with contraction it is within the rounding of its logit.
        reach = weights.reach[..., None] if model.contraction else 0.0
        at_least = np.exp2(-np.minimum(reach, 1000.0)) * np.maximum(1 - lam, 0.0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            cap = distance + (psi + lam) / np.maximum(1 - lam, 0.0) * largest
            cap = cap + (lost + lost_sum * largest) / at_least
            linear = np.where(usable, _total(terms), np.inf)
        capped = doubtful[..., None] & ~(linear <= cap)
        for name in terms:
            terms[name] = np.where(capped, cap if name == "logit" else 0.0, terms[name])

    # (7)
    before_division = size + _total(terms)
    terms["underflow"] = terms["underflow"] + arithmetic.floor
    terms["division"] = before_division * model.division_error
    largest_quotient = before_division * (1 + model.division_error) + arithmetic.floor
    terms["output rounding"] = _half_ulp(largest_quotient, fmt, arithmetic)
    return terms


def partial_error(arithmetic: Arithmetic) -> float:
    """(8) Relative error of a stored, normalised partial output."""
    model = arithmetic.model
    if model.merge == "max":
        return 0.0
    stored = as_format(model.partial_format)
    rounding = stored.unit_roundoff() if stored.precision < model.work.precision else 0.0
    return (1 + model.division_error) * (1 + rounding) - 1


def _log_mean_exp(weights: Weights, exponent: Float64Array, log_total: Float64Array) -> Float64Array:
    """log sum_j w_j exp(exponent_j) for exponents >= 0, also where exp overflows and w underflows."""
    if exponent.max(initial=0.0) < 0.5:
        result: Float64Array = np.log1p((weights.weight * expm1_bound(exponent)).sum(axis=-1))
        return result
    logs = np.where(weights.visible, exponent - LN_2 * weights.gap - log_total[..., None], -np.inf)
    top = logs.max(axis=-1)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total: Float64Array = top + np.log(np.exp(logs - top[..., None]).sum(axis=-1))
    return np.maximum(total, 0.0)


def _lse_terms(weights: Weights, arithmetic: Arithmetic) -> dict[str, Float64Array]:
    """(9) Budget of the log-sum-exp; it is a float32 whatever the input format."""
    model, u, way = arithmetic.model, arithmetic.u, weights.way
    log_total = np.log(weights.total)
    logit = _log_mean_exp(weights, weights.exponent, log_total)
    if arithmetic.confidence is not None:
        own = weights.weight * (weights.deviation - weights.shared)
        common = (weights.weight * weights.shared).sum(axis=-1)
        second_order = (weights.weight * weights.deviation**2).sum(axis=-1)
        independent = arithmetic.confidence * grouped_norm(weights, own)
        logit = np.fmin(logit, common + independent + second_order)
    terms = {"logit": LN_2 * weights.shift + logit, "P": np.zeros_like(logit)}
    if model.row_sum_from_p:
        p_error = np.log1p(np.broadcast_to(p_rounding(weights, arithmetic), weights.gap.shape))
        with_p = _log_mean_exp(weights, weights.exponent + p_error, log_total)
        terms["P"] = np.maximum(with_p - logit, 0.0)
    terms["sum"] = -np.log1p(-np.minimum(arithmetic.row_sum(way), 0.5))
    count = weights.visible.sum(axis=-1)
    operations = 2 * count + 4 * way.tiles * way.splits + 2
    terms["underflow"] = 2 * (2 * arithmetic.exp2_floor * count + operations * arithmetic.floor)
    error = terms["logit"] + terms["P"] + terms["sum"] + terms["underflow"]
    terms["logarithm"] = model.log2_error * (LN_2 + log_total + error)
    level = LN_2 * (np.abs(weights.peak) + weights.reach) + log_total + error + terms["logarithm"]
    terms["rounding"] = 4 * u * (1 + 4 * u) * level + arithmetic.floor
    return terms


def budget(
    query: Float64Array,
    key: Float64Array,
    value: Float64Array,
    visible: BoolArray,
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
    tiles: Tiles,
    alarm_lambda: float | None = None,
) -> Budget:
    """How far the results of one sequence may be from those of ``attention.attention``.

    Args:
        query: [num_q_heads, q_len, head_dim], values of ``fmt``.
        key: [num_kv_heads, kv_len, head_dim]
        value: [num_kv_heads, kv_len, head_dim]
        visible: [q_len, kv_len], which keys a query sees.
        scale: multiplies the logits.
        fmt: format of the inputs and of the output.
        model: the arithmetic of the kernel.
        tiles: the order in which it visits the keys, see ``tiling``.
        alarm_lambda: None for the gate, which a correct kernel never exceeds. A number for the alarm: errors
            that are independent from key to key are added as the root of their squares, times this number;
            never above the gate.

    Returns:
        Budgets and their terms. A query that sees no key has budget 0: its results are exact.
    """
    fmt = as_format(fmt)
    num_q_heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len, _ = key.shape
    if visible.shape != (q_len, kv_len):
        raise ValueError(f"visible must have the shape {(q_len, kv_len)}, got {visible.shape}")
    group_size = num_q_heads // num_kv_heads
    shape = (num_kv_heads, group_size * q_len)
    rows = np.tile(visible, (group_size, 1))
    query = query.reshape(*shape, head_dim)
    unbounded, lse_unbounded, (query, key, value) = non_finite(query, key, value, rows)

    if kv_len == 0 or q_len == 0:
        out_zero, lse_zero = np.zeros((num_q_heads, q_len, value.shape[-1])), np.zeros((num_q_heads, q_len))
        return Budget(out_zero, lse_zero, dict.fromkeys(TERMS, out_zero), dict.fromkeys(LSE_TERMS, lse_zero))
    # Logits that are not finite in float64 have no bound; overflow_free says so too.
    with np.errstate(over="ignore", invalid="ignore"):
        arithmetic = Arithmetic(model, fmt, head_dim, None)
        weights = weights_of(query, key, rows, scale, arithmetic, tiles)
        exact = weights.weight @ value
        terms = _out_terms(weights, value, exact, arithmetic)
        lse_terms = _lse_terms(weights, arithmetic)
        if alarm_lambda is not None:
            arithmetic = Arithmetic(model, fmt, head_dim, alarm_lambda)
            weights = weights_of(query, key, rows, scale, arithmetic, tiles)
            terms = _smaller(terms, _out_terms(weights, value, exact, arithmetic))
            lse_terms = _smaller(lse_terms, _lse_terms(weights, arithmetic))

    seen = np.broadcast_to(weights.way.splits > 0, shape)
    shown = {name: _finish(term, seen[..., None], unbounded) for name, term in terms.items()}
    lse_shown = {name: _finish(term, seen, lse_unbounded) for name, term in lse_terms.items()}
    for parts in (shown, lse_shown):
        parts["oracle"] = ORACLE_SHARE * _total(parts)
    shaped = {name: term.reshape(num_q_heads, q_len, -1) for name, term in shown.items()}
    lse_shaped = {name: term.reshape(num_q_heads, q_len) for name, term in lse_shown.items()}
    return Budget(_total(shaped), _total(lse_shaped), shaped, lse_shaped)


def _total(terms: dict[str, Float64Array]) -> Float64Array:
    return np.asarray(sum(terms.values()))


def _smaller(gate: dict[str, Float64Array], alarm: dict[str, Float64Array]) -> dict[str, Float64Array]:
    """The terms of whichever budget is smaller, element by element."""
    smaller = _total(alarm) < _total(gate)
    return {name: np.where(smaller, alarm[name], gate[name]) for name in gate}


def _finish(term: Float64Array, seen: BoolArray, unbounded: BoolArray | None) -> Float64Array:
    term = np.where(seen, term, 0.0)
    return term if unbounded is None else np.where(unbounded, np.nan, term)
