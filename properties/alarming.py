"""The alarm: is an error likely, if roundings are independent? It counts only if it comes back on fresh data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from properties.assertions import LawViolation
from properties.case import Case
from properties.checking import expectations
from properties.recorder import AlarmCount, recorder
from properties.runner import Run, run
from properties.subjects import Subject

LAMBDA = 6.0
FRESH_SEEDS = 5
ENOUGH = 3


def alarm_used(made: Run) -> float:
    """The largest error of a run, of outputs and log-sum-exps, over the alarm; above 1 the alarm is raised."""
    worst = 0.0
    for step, expected in zip(made.steps, expectations(made, LAMBDA), strict=False):
        if step.got is None or expected is None or expected.out.size == 0:
            continue
        pairs = [(step.got.values, expected.out, expected.out_budget)]
        if step.got.has_lse:
            pairs.append((step.got.lse_values, expected.lse, expected.lse_budget))
        for got, right, allowed in pairs:
            with np.errstate(invalid="ignore", divide="ignore"):
                used = np.where(got == right, 0.0, np.abs(got - right) / allowed)
            worst = max(worst, float(np.where(np.isnan(used), np.inf, used).max()))
    return worst


def with_fresh_data(case: Case) -> list[Case]:
    """The same shapes on five other draws of the data."""
    return [replace(case, seed=(case.seed + 9973 * (i + 1)) % (1 << 16)) for i in range(FRESH_SEEDS)]


def assert_no_alarm_comes_back(case: Case, subject: Subject | None = None) -> None:
    """Errors stay within the alarm, or leave it for no reason that shows on fresh data of the same shape.

    Raises:
        LawViolation: the alarm is raised, and raised again on at least 3 of 5 fresh draws.
    """
    if (case.values, case.gain, case.patches) != ("normal", 0, ()):
        recorder.tally.not_offered["independent roundings"] += 1
        return
    used = alarm_used(run(case, subject))
    again = [alarm_used(run(fresh, subject)) for fresh in with_fresh_data(case)] if used > 1 else []
    came_back = sum(other > 1 for other in again)
    recorder.tally.alarm += AlarmCount(1, int(used > 1), int(came_back >= ENOUGH), used)
    if came_back >= ENOUGH:
        others = ", ".join(f"{other:.2f}" for other in again)
        raise LawViolation(
            "alarm",
            f"the alarm came back on {came_back} of {FRESH_SEEDS} fresh draws of the data\n"
            f"  largest error {used:.2f} x alarm; on the others {others}\n"
            f"  case: {case!r}",
            case,
        )
