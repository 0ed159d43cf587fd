"""Which errors exceed the alarm, without computing it where they surely do not."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.arithmetic_model import ArithmeticModel
from references.error_bounds import ORACLE_SHARE, budgets, gate_of
from references.least_alarm import LeastAlarm
from references.rounding import Format, as_format
from references.rounding_errors import arithmetic_of
from references.sequence import Sequence, batches

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# So near to 1 the use of an alarm may be another one when the same query is worked on beside others.
UNDECIDED = 8 * ORACLE_SHARE


@dataclass(frozen=True)
class Errors:
    """How far the results of one sequence are from the exact ones; infinite where they are not numbers.

    Attributes:
        out: [num_q_heads, q_len, head_dim]
        lse: [num_q_heads, q_len]
    """

    out: Float64Array
    lse: Float64Array


def largest_over_alarm(
    several: Several[Sequence],
    errors: Several[Errors],
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
    alarm_lambda: float,
) -> float:
    """The largest error over its alarm if that is above 1; else a number up to 1 that no error over its alarm exceeds.

    The alarm, ``error_bounds.budgets`` with ``alarm_lambda``, is computed for the queries only that have an error above
    ``LeastAlarm``, and for all that are worked on together if that cannot decide.

    Args:
        several: sequences with the same heads and head_dim.
        errors: of each.
        scale, fmt, model, alarm_lambda: see ``budgets``.
    """
    if any(np.isinf(error).any() for of_one in errors for error in (of_one.out, of_one.lse)):
        return np.inf
    worst = 0.0
    for one, of_one in zip(several, errors, strict=True):
        if not one.has_pairs and (of_one.out.any() or of_one.lse.any()):
            return np.inf
    for places in batches(list(several)):
        together = [several[place] for place in places], [errors[place] for place in places]
        worst = max(worst, _used(*together, scale, as_format(fmt), model, alarm_lambda))
    return worst


def _used(
    several: list[Sequence],
    errors: list[Errors],
    scale: float,
    fmt: Format,
    model: ArithmeticModel,
    alarm_lambda: float,
) -> float:
    """``largest_over_alarm`` of sequences that are worked on together."""

    def of_alarm(some: list[Sequence], their_errors: list[Errors]) -> float:
        found = budgets(some, scale=scale, fmt=fmt, model=model, alarm_lambda=alarm_lambda)
        pairs = zip(found, their_errors, strict=True)
        return max(max(_largest(its.out, of.out), _largest(its.lse, of.lse)) for of, its in pairs)

    head_dim = several[0].query.shape[-1]
    of_gate, arithmetic = arithmetic_of(model, fmt, head_dim), arithmetic_of(model, fmt, head_dim, alarm_lambda)
    with np.errstate(over="ignore", invalid="ignore"):
        gate = gate_of(several, scale, of_gate)
        if gate is None:
            return of_alarm(several, errors)
        least = LeastAlarm(gate, of_gate, arithmetic)
        rows, lse = gate.problem.sequences.rows, least.lse()
        worst, above = _against(least.out(), lse, several, errors, rows)
        if above:
            worst, above = _against(least.nearer_out(), lse, several, errors, rows)
    if not above:
        return worst
    exceeding = [pair for place, chosen in above.items() for pair in _queries(several[place], errors[place], chosen)]
    used = of_alarm([one for one, _ in exceeding], [its for _, its in exceeding])
    if abs(used - 1) <= UNDECIDED:
        return of_alarm(several, errors)
    return max(worst, used)


def _against(
    least_out: Float64Array, least_lse: Float64Array, several: list[Sequence], errors: list[Errors], rows: list[slice]
) -> tuple[float, dict[int, BoolArray]]:
    """The largest error over bounds of queries where it is not above 1; the others [num_kv_heads, rows] by sequence."""
    worst, above = 0.0, {}
    for place, (one, its, mine) in enumerate(zip(several, errors, rows, strict=True)):
        num_kv_heads, head_dim = len(one.key), one.query.shape[-1]
        out, lse = its.out.reshape(num_kv_heads, -1, head_dim), its.lse.reshape(num_kv_heads, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Unlike max, np.maximum keeps NaN.
            largest = float(np.maximum((out / least_out[:, mine]).max(), (lse / least_lse[:, mine]).max()))
        if largest <= 1:
            worst = max(worst, largest)
            continue
        used = np.maximum(_ratio(out, least_out[:, mine]).max(axis=-1), _ratio(lse, least_lse[:, mine]))
        exceeding = used > 1
        if exceeding.any():
            above[place] = exceeding
        worst = max(worst, float(used.max(where=~exceeding, initial=0.0)))
    return worst, above


def _queries(one: Sequence, errors: Errors, chosen: BoolArray) -> Iterator[tuple[Sequence, Errors]]:
    """The chosen queries [num_kv_heads, rows] of every kv head, as sequences of one head."""
    num_kv_heads, q_len, head_dim = len(one.key), one.query.shape[1], one.query.shape[-1]
    queries, out = (x.reshape(num_kv_heads, -1, head_dim) for x in (one.query, errors.out))
    lse = errors.lse.reshape(num_kv_heads, -1)
    for head in np.flatnonzero(chosen.any(axis=-1)):
        rows, its = np.flatnonzero(chosen[head]), slice(head, head + 1)
        sees = one.visible[rows % q_len]
        asked = Sequence(queries[its, rows], one.key[its], one.value[its], sees, one.tiles)
        yield asked, Errors(out[its, rows], lse[its, rows])


def _largest(errors: Float64Array, allowed: Float64Array) -> float:
    return float(_ratio(errors, allowed).max(initial=0.0))


def _ratio(errors: Float64Array, allowed: Float64Array) -> Float64Array:
    """0 where there is no error, infinite where nothing is allowed or nothing is known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = errors / allowed
    np.copyto(ratio, np.inf, where=np.isnan(ratio))
    np.copyto(ratio, 0.0, where=errors == 0)
    return ratio
