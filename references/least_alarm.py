"""Bounds that the alarm is never below, made of what the gate has computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

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
# What the logit term of the gate may be above its root, as a share of the terms before the division: see ``Centred``.
ROOT_ABOVE = 2.0**-18
# The largest x * 2**-x.
LARGEST_WEIGHED_GAP = 1 / (math.e * LN_2)


@dataclass(frozen=True)
class LeastAlarm:
    """Bounds that the alarm of the same inputs is not below; NaN: nothing is known.

    Attributes:
        gate: of these inputs.
        of_gate, of_alarm: what an operation errs by at most, and probably.
    """

    gate: Gate
    of_gate: Arithmetic
    of_alarm: Arithmetic

    def out(self) -> Float64Array:
        """Terms of P, accumulation, sum, division and output, [num_kv_heads, rows, head_dim].

        Where the hull of the values may be the alarm, only the last.
        """
        sizes, p_error, accumulation = self.gate.sums.sizes, self.gate.shares.p_error, self._accumulation
        inverse, root = self._inverse, self._root
        if isinstance(p_error, float):
            least: Float64Array = sizes[0] * column(inverse * (root * p_error + accumulation))
        else:
            least = sizes[0] * column(inverse * accumulation)
            least += sizes[1] * column(inverse * root)
        return self._with_rounding(least)

    def nearer_out(self) -> Float64Array:
        """The same with the sum of squares of P's roundings, underflow, and part of the logits."""
        gate, inverse, arithmetic = self.gate, self._inverse, self.of_alarm
        problem, sums = gate.problem, gate.sums
        rounded, factor = gate.shares.rounded()
        independent = arithmetic.rounds_p and arithmetic.model.p_rounding == "nearest"
        (values,), (squares, weighted, *of_p) = problem.sequences.sums(
            (None, [None]), (np.square, [None, problem.exact.power, *([np.square(rounded)] if independent else [])])
        )
        least = sums.sizes[0] * column(inverse * self._accumulation)
        of_rounding = sums.sizes[-1] * column(inverse * factor)
        if of_p:
            np.minimum(of_rounding, np.sqrt(of_p[0]) * column(self._confidence * inverse * factor), out=of_rounding)
        least += of_rounding
        least += column(inverse * arithmetic.lost_by_operations(problem.seen))
        if not arithmetic.model.row_sum_from_p and arithmetic.model.merge != "lse":
            least += self._logit(values, squares, weighted)
        return self._with_rounding(least)

    def lse(self) -> Float64Array:
        """Terms of logits, sum, logarithm and rounding, [num_kv_heads, rows]."""
        model, exact, deviations = self.of_gate.model, self.gate.problem.exact, self.gate.deviations
        log_total = np.log(exact.total)
        least = np.minimum(self._row_sum, 0.5) + model.log2_error * (LN_2 + log_total)
        least += 4 * self.of_gate.u * (LN_2 * np.abs(exact.peak) + log_total)
        least += LN_2 * deviations.shift
        # Merging through stored log-sum-exps adds the error of the row sum, and rounding P is no error of a logit.
        if not model.row_sum_from_p and model.merge != "lse":
            logit = self._scores * np.maximum(self.gate.share_sum * LEFT - LN_2 * deviations.exponentials, 0.0)
            logit -= math.log1p(-model.exp2_error)
            logit *= self._root
            if deviations.wide is not None:
                logit[deviations.wide] = 0.0
            least += logit
        least *= LEFT
        if exact.blind is not None:
            least[:, exact.blind] = 0.0
        return np.asarray(least)

    def _with_rounding(self, least: Float64Array) -> Float64Array:
        """Add the terms of the sum, of the division and of the output; the last is exact, so it comes last."""
        problem, arithmetic = self.gate.problem, self.of_alarm
        least += problem.size * column(self._usable * (self._row_sum + arithmetic.model.division_error))
        if arithmetic.fmt.precision < arithmetic.model.work.precision:
            rounding = np.empty_like(least)
            half_ulp(problem.size, arithmetic.fmt, arithmetic, rounding)
            least += rounding
        if problem.exact.blind is not None:
            least[:, problem.exact.blind] = 0.0
        return least

    def _logit(self, values: Float64Array, squares: Float64Array, weighted: Float64Array) -> Float64Array:
        """What one exponential of every key can do, and independent errors of scores.

        Their root of a sum of squares is at least sum s (v - o)**2 over the root of sum (v - o)**2, the one less than
        the gate's by what a gap and the exponentials can cause, the other over all keys of a sequence.

        Args:
            values, squares: sums of v and v**2 over the keys of a sequence, [num_kv_heads, sequences, head_dim].
            weighted: of v**2, with the powers.
        """
        problem, deviations, share_sum = self.gate.problem, self.gate.deviations, self.gate.share_sum
        total, sequences, terms = problem.exact.total, problem.sequences, self.gate.out[0]
        cancelled = (sequences.kv_len + 8) * 2.0**-50  # of sums of squares, by float64
        square = problem.size * problem.size
        _, rows, _, keys = sequences.sizes
        ones = np.ones_like(total)
        outer = sequences.times(squares, ones) + column(np.repeat(keys, rows)) * square
        distances = outer * (1 + cancelled) - 2 * problem.out * sequences.times(values, ones)
        outer = weighted / column(total)
        variance = outer - square
        outer += square
        outer *= cancelled

        lost = deviations.row_sum * (1 + share_sum) + self.of_gate.lost_sum(problem.seen) / total
        root = np.maximum(terms[0] * LEFT - np.add.reduce(terms[:5]) * ROOT_ABOVE, 0.0)
        root *= column(np.maximum(1 - share_sum - lost, 0.0))
        inverse_sum = np.divide(self._shrink, share_sum, out=np.zeros_like(share_sum), where=share_sum > 0)
        most, each = LN_2 * deviations.exponentials, -math.log1p(-self.of_gate.model.exp2_error)
        own = root * root * column(inverse_sum)
        own -= column(most / LEFT) * (variance + outer)
        own -= column(LN_2 * deviations.theta * LARGEST_WEIGHED_GAP / (LEFT * total)) * distances
        np.maximum(own, 0.0, out=own)
        own *= self._scores
        of_each = LEFT * each * np.maximum(variance - outer, 0.0)
        mass = each + self._scores * np.maximum(share_sum * self._shrink * LEFT - most, 0.0)
        linear: Float64Array = np.sqrt((own + of_each) * column(mass))
        with np.errstate(divide="ignore", invalid="ignore"):
            independent = np.where(own > 0, self._confidence * own / np.sqrt(distances), 0.0)
        independent += np.sqrt(of_each * each)
        np.minimum(linear, independent, out=linear)
        linear *= column(self._usable)
        return linear

    @property
    def _confidence(self) -> float:
        assert self.of_alarm.confidence is not None
        return self.of_alarm.confidence

    @cached_property
    def _row_sum(self) -> Error:
        """Without a rescaling: the ways of the keys may have fewer of them in the alarm."""
        return self.of_alarm.row_sum(self.gate.problem.seen, 0.0)

    @cached_property
    def _accumulation(self) -> Error:
        return self.of_alarm.accumulation(self.gate.problem.seen, 0.0)

    @cached_property
    def _root(self) -> Error:
        """By Cauchy and Schwarz a root of a sum of squares over n keys is at least the sum over sqrt(n)."""
        root: Error = np.minimum(1.0, self._confidence / np.sqrt(np.maximum(self.gate.problem.seen.keys, 1)))
        return root

    @cached_property
    def _scores(self) -> float:
        """At most what errors of logits are in the alarm, exponentials and constant apart, over those in the gate."""
        return self.of_alarm.score / self.of_gate.score if self.of_gate.score else 1.0

    @cached_property
    def _usable(self) -> Float64Array:
        lost = self.gate.deviations.row_sum + self.of_gate.lost_sum(self.gate.problem.seen)
        return np.where((self.gate.share_sum > NOT_DOUBTFUL) | (lost > 0.5), 0.0, LEFT)

    @cached_property
    def _shrink(self) -> Float64Array:
        """Less than 1 where phi is not linear: at most log(1 + phi) / phi, and 1 / (1 + phi), of each key."""
        wide, shrink = self.gate.deviations.wide, np.ones_like(self.gate.share_sum)
        if wide is not None:
            shrink[wide] = np.exp(-self.gate.deviations.largest[wide])
        return shrink

    @cached_property
    def _inverse(self) -> Float64Array:
        inverse: Float64Array = self._usable * self._shrink / self.gate.problem.exact.total
        return inverse
