"""The alarm: is an error likely, if roundings are independent? It counts only if it comes back on fresh data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from properties import device as devices
from properties.assertions import Float64Array, LawViolation
from properties.case import Case
from properties.checking import answers_of
from properties.recorder import AlarmCount, recorder
from properties.runner import Run, run
from properties.subjects import Subject
from references.alarm_use import Errors, largest_over_alarm
from references.sequence import Sequence

LAMBDA = 6.0
FRESH_SEEDS = 5
ENOUGH = 3


def alarm_used(made: Run) -> float:
    """The largest error of a run, of outputs and log-sum-exps, over the alarm if that is above 1, which raises it.

    Else no error over the alarm exceeds the number returned; see ``references.alarm_use``.
    """
    sequences: list[Sequence] = []
    errors: list[Errors] = []
    for step, answer in zip(made.steps, answers_of(made), strict=False):
        if step.got is None or answer is None or answer.out.size == 0:
            continue
        out = _distance(step.got.values, answer.out)
        lse = _distance(step.got.lse_values, answer.lse) if step.got.has_lse else np.zeros(answer.lse.shape)
        for b, row in enumerate(answer.rows):
            real = row.query.shape[1]
            if out[b, :, real:].any() or lse[b, :, real:].any():  # padding queries are exact
                return np.inf
            sequences.append(row)
            errors.append(Errors(out[b, :, :real], lse[b, :, :real]))
    case, model = made.case, made.subject.model(devices.current())
    return largest_over_alarm(
        sequences, errors, scale=case.softmax_scale, fmt=case.dtype, model=model, alarm_lambda=LAMBDA
    )


def _distance(got: Float64Array, right: Float64Array) -> Float64Array:
    """How far numbers are from the right ones; infinite where they are none."""
    with np.errstate(invalid="ignore"):
        error = np.where(got == right, 0.0, np.abs(got - right))
    return np.where(np.isnan(error), np.inf, error)


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
            f"  largest error {used:.2f} x alarm; on the others at most {others}\n"
            f"  case: {case!r}",
            case,
        )
