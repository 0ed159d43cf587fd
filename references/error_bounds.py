"""How far a correct kernel may be from the exact result: one number for every output element.

The derivation, term by term, is in docs/numerics.md; the equation numbers below are those of its sections.
Everything is a bound, nothing is an estimate, and no higher-order part is dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.alarm import Alike, independent_of, slack_of
from references.arithmetic_model import ArithmeticModel
from references.budget_terms import LSE_TERMS, TERMS, Likely, Problem, lse_terms, out_terms
from references.centred import Centred
from references.overflow import non_finite, surely_finite
from references.overflow import overflow_free as overflow_free
from references.rounding import Format, as_format
from references.rounding_errors import Arithmetic, arithmetic_of
from references.sequence import Sequence, batches, joined
from references.shares import Shares, Sums, shares_of, sums_of, sums_of_alarm
from references.softmax import LOG2_E, softmax_of
from references.tiling import Tiles, counts, layout
from references.tiling import tiling as tiling
from references.weight_errors import Deviations, deviations_of, scores_of

__all__ = [
    "LSE_TERMS", "ORACLE_SHARE", "TERMS", "Budget", "Sequence", "budget", "budgets", "overflow_free", "tiling",
]  # fmt: skip

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# The oracle's own error, as a share of the budget; tests/test_reference_trust.py asserts that it is.
ORACLE_SHARE = 2.0**-20


@dataclass(frozen=True)
class Budget:
    """Error budgets and what they consist of.

    A budget of 0 is met by the exact value only. NaN means that there is no bound, because a non-finite input
    is visible or the logits overflow even float64.

    Attributes:
        out: [num_q_heads, q_len, head_dim]
        lse: [num_q_heads, q_len]
        overflow_free: [num_q_heads, q_len], see ``overflow.overflow_free``.
        parts: [terms, num_kv_heads, rows, head_dim], what ``out`` consists of; a row is a query of a head of a group.
        lse_parts: [lse terms, num_kv_heads, rows]
    """

    out: Float64Array
    lse: Float64Array
    overflow_free: BoolArray
    parts: Float64Array
    lse_parts: Float64Array

    @property
    def by_term(self) -> Float64Array:
        """[terms, num_q_heads, q_len, head_dim]"""
        return self.parts.reshape(len(TERMS), *self.out.shape)

    @property
    def lse_by_term(self) -> Float64Array:
        """[lse terms, num_q_heads, q_len]"""
        return self.lse_parts.reshape(len(LSE_TERMS), *self.lse.shape)

    @property
    def terms(self) -> dict[str, Float64Array]:
        """By name, arrays like ``out`` that add up to it."""
        return dict(zip(TERMS, self.by_term, strict=True))

    @property
    def lse_terms(self) -> dict[str, Float64Array]:
        """By name, arrays like ``lse`` that add up to it."""
        return dict(zip(LSE_TERMS, self.lse_by_term, strict=True))


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
    """How far the results of one sequence may be from those of ``attention.attention``; see ``budgets``."""
    sequence = Sequence(query, key, value, visible, tiles)
    return budgets([sequence], scale=scale, fmt=fmt, model=model, alarm_lambda=alarm_lambda)[0]


def budgets(
    sequences: Iterable[Sequence],
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
    alarm_lambda: float | None = None,
) -> list[Budget]:
    """How far the results of sequences with the same heads and head_dim may be from those of ``attention.attention``.

    Small sequences are worked on together, because most of the cost of each would be that of calling NumPy.

    Args:
        sequences: what attends to what, and in which order.
        scale: multiplies the logits.
        fmt: format of the inputs and of the output.
        model: the arithmetic of the kernel.
        alarm_lambda: None for the gate, which a correct kernel never exceeds. A number for the alarm: errors
            that are independent from key to key are added as the root of their squares, times this number;
            never above the gate.

    Returns:
        Budgets and their terms. A query that sees no key has budget 0: its results are exact.
    """
    fmt, several = as_format(fmt), list(sequences)
    found = {place: _nothing(one) for place, one in enumerate(several) if not one.has_pairs}
    for places in batches(several):
        together = [several[place] for place in places]
        found |= zip(places, _budgets(together, scale, fmt, model, alarm_lambda), strict=True)
    return [found[place] for place in range(len(several))]


def _budgets(
    several: list[Sequence], scale: float, fmt: Format, model: ArithmeticModel, alarm_lambda: float | None
) -> list[Budget]:
    """The budgets of sequences that have queries and keys."""
    # Logits that are not finite in float64 have no bound; overflow_free says so too.
    with np.errstate(over="ignore", invalid="ignore"):
        found = _of_finite(several, scale, fmt, model, alarm_lambda)
        if found is not None:
            return found
        cleaned = [non_finite(one.query, one.key, one.value, one.visible) for one in several]
        clean = [
            Sequence(*inputs, one.visible, one.tiles) for one, (_, _, inputs) in zip(several, cleaned, strict=True)
        ]
        found = _of_finite(clean, scale, fmt, model, alarm_lambda)
    assert found is not None
    return [
        result if bad is None or lse_bad is None else _without_bound(one, result, bad, lse_bad, scale, fmt, model)
        for one, result, (bad, lse_bad, _) in zip(several, found, cleaned, strict=True)
    ]


@dataclass(frozen=True)
class Gate:
    """The gate of finite inputs without the oracle's share, and what it is made of.

    Attributes:
        share_sum: [num_kv_heads, rows] sums of w phi.
        out, lse: terms and their total, see ``out_terms`` and ``lse_terms``.
        largest_score: of sums of magnitudes.
    """

    problem: Problem
    deviations: Deviations
    shares: Shares
    sums: Sums
    share_sum: Float64Array
    out: tuple[Float64Array, Float64Array]
    lse: tuple[Float64Array, Float64Array]
    largest_score: float


def gate_of(several: list[Sequence], scale: float, arithmetic: Arithmetic) -> Gate | None:
    """The gate of finite inputs; None: an input is not finite."""
    together = joined(several)
    logit, sizes = scores_of(together, scale, arithmetic)
    largest_score = float(sizes.of_products.max())
    if not math.isfinite(largest_score):
        return None
    exact = softmax_of(together, logit)
    tiles = [layout(one.tiles, one.key.shape[1]) for one in several]
    seen = counts(together.visible, tiles, arithmetic.products_per_step if arithmetic.fused else 1)
    deviations = deviations_of(together, exact, sizes, scale, arithmetic, seen, tiles)
    shares = shares_of(exact, deviations, arithmetic)
    sums = sums_of(together, exact, shares, arithmetic)
    if not math.isfinite(sums.largest_sum):
        return None
    out = sums.weighted / exact.total[..., None]
    problem = Problem(together, tiles, exact, out, np.abs(out), Centred(together, out), seen)
    *of_out, share_sum = out_terms(problem, deviations, shares, sums, arithmetic)
    of_lse = lse_terms(problem, deviations, share_sum, arithmetic)
    return Gate(problem, deviations, shares, sums, share_sum, (of_out[0], of_out[1]), of_lse, largest_score)


def _lower_to_alarm(gate: Gate, scale: float, arithmetic: Arithmetic) -> None:
    """Take the terms of the alarm, whose arithmetic it is, where they are less than those of the gate."""
    problem = gate.problem
    together, exact, seen = problem.sequences, problem.exact, problem.seen
    _, sizes = scores_of(together, scale, arithmetic)
    slack = slack_of(exact, sizes.of_products, scale * LOG2_E, together.query.shape[-1])
    deviations = deviations_of(together, exact, sizes, scale, arithmetic, seen, problem.tiles)
    shares = shares_of(exact, deviations, arithmetic, gate.shares)
    likely = Likely(independent_of(exact, deviations), Alike(together, exact, slack))
    sums = sums_of_alarm(together, exact, shares, likely.independent, arithmetic, (gate.shares, gate.sums))
    *of_out, share_sum = out_terms(problem, deviations, shares, sums, arithmetic, likely)
    _take_smaller(*gate.out, *of_out)
    _take_smaller(*gate.lse, *lse_terms(problem, deviations, share_sum, arithmetic, likely))


def _of_finite(
    several: list[Sequence], scale: float, fmt: Format, model: ArithmeticModel, alarm_lambda: float | None
) -> list[Budget] | None:
    """The budgets of finite inputs; None: an input is not finite."""
    head_dim = several[0].query.shape[-1]
    arithmetic = arithmetic_of(model, fmt, head_dim)
    gate = gate_of(several, scale, arithmetic)
    if gate is None:
        return None
    if alarm_lambda is not None:
        _lower_to_alarm(gate, scale, arithmetic_of(model, fmt, head_dim, alarm_lambda))
    together, exact = gate.problem.sequences, gate.problem.exact
    (terms, total), (of_lse, lse_total) = gate.out, gate.lse
    for parts, sum_of_parts in ((terms, total), (of_lse, lse_total)):
        np.multiply(sum_of_parts, ORACLE_SHARE, out=parts[-1])
        sum_of_parts += parts[-1]
        if exact.blind is not None:
            parts[:, :, exact.blind] = 0.0
            sum_of_parts[:, exact.blind] = 0.0
    sizes = gate.largest_score, gate.sums.largest_sum, gate.sums.largest_value
    finite = surely_finite(*sizes, together.kv_len, scale, arithmetic)
    found = []
    for one, rows in zip(several, together.rows, strict=True):
        shape = one.query.shape[:2]
        if finite or surely_finite(*_largest(one, arithmetic), one.key.shape[1], scale, arithmetic):
            free = np.ones(shape, np.bool_)
        else:
            free = overflow_free(one.query, one.key, one.value, one.visible, scale=scale, fmt=fmt, model=model)
        its_out, its_lse = total[:, rows].reshape(*shape, -1), lse_total[:, rows].reshape(shape)
        found.append(Budget(its_out, its_lse, free, terms[:, :, rows], of_lse[:, :, rows]))
    return found


def _without_bound(
    one: Sequence,
    found: Budget,
    bad: BoolArray,
    lse_bad: BoolArray,
    scale: float,
    fmt: Format,
    model: ArithmeticModel,
) -> Budget:
    """NaN where a non-finite input reaches an output or a log-sum-exp; ``found`` with zeros in the place of those."""
    for allowed, parts, where in ((found.out, found.parts, bad), (found.lse, found.lse_parts, lse_bad)):
        allowed[where] = np.nan
        parts[:, where.reshape(parts.shape[1:])] = np.nan
    free = overflow_free(one.query, one.key, one.value, one.visible, scale=scale, fmt=fmt, model=model)
    return dataclasses.replace(found, overflow_free=free)


def _largest(one: Sequence, arithmetic: Arithmetic) -> tuple[float, float, float]:
    """Bounds of the sizes of scores, of sums of values and of values, from the largest of the inputs alone."""
    query, key, value = (float(np.abs(x).max()) for x in (one.query, one.key, one.value))
    lifted = arithmetic.fmt.smallest_normal if arithmetic.fused else 0.0
    return arithmetic.head_dim * max(query, lifted) * max(key, lifted), one.key.shape[1] * value, value


def _nothing(one: Sequence) -> Budget:
    """The budget of queries that see no key."""
    shape, head_dim = one.query.shape[:2], one.value.shape[-1]
    parts, lse_parts = np.zeros((len(TERMS), *shape, head_dim)), np.zeros((len(LSE_TERMS), *shape))
    return Budget(parts[0], lse_parts[0], np.ones(shape, np.bool_), parts, lse_parts)


def _take_smaller(gate: Float64Array, gate_total: Float64Array, alarm: Float64Array, alarm_total: Float64Array) -> None:
    """Take the terms [terms, ...] of whichever budget is smaller, element by element."""
    smaller = alarm_total < gate_total
    np.copyto(gate, alarm, where=smaller)
    np.copyto(gate_total, alarm_total, where=smaller)
