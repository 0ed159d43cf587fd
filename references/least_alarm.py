"""A bound that the alarm is never below, made of what the gate has computed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from references.budget_terms import half_ulp
from references.error_bounds import Gate
from references.rounding_errors import Arithmetic, Error
from references.softmax import LN_2
from references.weight_errors import LINEAR_UP_TO, column

Float64Array = NDArray[np.float64]

# Times this, a bound stays one after roundings of float64, which are far fewer than 2**40, and although phi and
# log1p(phi) are not linear up to LINEAR_UP_TO: 1 + 0.501 * LINEAR_UP_TO there, 1 - LINEAR_UP_TO / 2 here.
LEFT = 1 - 2 * LINEAR_UP_TO
# Up to this sum of w phi, and half of the row sum lost, the hull of the values is no bound of the alarm.
NOT_DOUBTFUL = 0.12


def least_alarm(gate: Gate, of_gate: Arithmetic, of_alarm: Arithmetic) -> tuple[Float64Array, Float64Array]:
    """Of outputs, [num_kv_heads, rows, head_dim], and of log-sum-exps, [num_kv_heads, rows]; NaN: nothing is known.

    Args:
        gate: of the same inputs.
        of_gate, of_alarm: what an operation errs by at most, and probably.
    """
    # The ways of the keys may have fewer rescalings in the alarm, and have none here.
    row_sum = of_alarm.row_sum(gate.problem.seen, 0.0)
    confidence = of_alarm.confidence
    assert confidence is not None
    # By Cauchy and Schwarz a root of a sum of squares over n keys is at least the sum over sqrt(n).
    root: Error = np.minimum(1.0, confidence / np.sqrt(np.maximum(gate.problem.seen.keys, 1)))
    out = _of_out(gate, of_alarm, row_sum, root)
    lse = _of_lse(gate, of_gate, of_alarm, row_sum, root)
    if gate.problem.exact.blind is not None:
        out[:, gate.problem.exact.blind] = 0.0
        lse[:, gate.problem.exact.blind] = 0.0
    return out, lse


def _of_out(gate: Gate, arithmetic: Arithmetic, row_sum: Error, root: Error) -> Float64Array:
    """The terms of P, of the accumulation, of the sum, of the division and of the output's rounding, from below.

    Where the hull of the values may be the alarm, only the last.
    """
    problem, sizes, p_error = gate.problem, gate.sums.sizes, gate.shares.p_error
    model, wide = arithmetic.model, gate.deviations.wide
    accumulation = arithmetic.accumulation(problem.seen, 0.0)
    lost = gate.deviations.row_sum + arithmetic.lost_sum(problem.seen)
    inverse = np.where((gate.share_sum > NOT_DOUBTFUL) | (lost > 0.5), 0.0, LEFT)
    of_size = inverse * (row_sum + model.division_error)
    inverse /= problem.exact.total
    if wide is not None:  # the gate's shares contain 1 + phi
        inverse[wide] *= np.exp(-gate.deviations.largest[wide])
    least: Float64Array
    if isinstance(p_error, float):
        least = sizes[0] * column(inverse * (root * p_error + accumulation))
    else:
        least = sizes[0] * column(inverse * accumulation)
        least += sizes[1] * column(inverse * root)
    least += problem.size * column(of_size)
    if arithmetic.fmt.precision < model.work.precision:
        rounding = np.empty_like(least)
        half_ulp(problem.size, arithmetic.fmt, arithmetic, rounding)
        least += rounding
    return least


def _of_lse(gate: Gate, of_gate: Arithmetic, of_alarm: Arithmetic, row_sum: Error, root: Error) -> Float64Array:
    """The terms of logits, of the sum, of the logarithm and of the rounding, from below."""
    model, exact, deviations = of_gate.model, gate.problem.exact, gate.deviations
    log_total = np.log(exact.total)
    least = np.minimum(row_sum, 0.5) + model.log2_error * (LN_2 + log_total)
    least += 4 * of_gate.u * (LN_2 * np.abs(exact.peak) + log_total)
    least += LN_2 * deviations.shift
    # The alarm's scores err by less, and its keys may pass fewer exponentials, but one at least; merging through
    # stored log-sum-exps adds the error of the row sum, and the rounding of P is no error of a logit.
    if not model.row_sum_from_p and model.merge != "lse":
        scores = of_alarm.score / of_gate.score if of_gate.score else 1.0
        logit = np.maximum(gate.share_sum * LEFT - LN_2 * deviations.exponentials, 0.0)
        logit *= scores
        logit -= math.log1p(-model.exp2_error)
        logit *= root
        if deviations.wide is not None:
            logit[deviations.wide] = 0.0
        least += logit
    least *= LEFT
    return np.asarray(least)
