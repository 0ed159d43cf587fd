"""The errors of a run as noise: over what rounding predicts, pooled, and judged."""

from __future__ import annotations

from properties import device as devices
from properties.assertions import LawViolation, Utilisation
from properties.case import Case
from properties.checking import expectations, visible_problem
from properties.noise import clean_chi, judge
from properties.recorder import recorder
from properties.runner import Run
from references.noise import NoisePool, predicted_sigma


def pooled(made: Run) -> NoisePool:
    """The pool of one run's outputs."""
    pool = NoisePool()
    model = made.subject.model(devices.current())
    for step, expected in zip(made.steps, expectations(made), strict=True):
        if step.got is None or expected is None:
            continue
        for b in range(made.case.batch):
            query, key, value, visible = visible_problem(made, step.plan, b)
            sigma = predicted_sigma(
                query, key, value, visible, scale=made.case.softmax_scale, fmt=made.case.dtype, model=model
            )
            real = slice(0, query.shape[1])
            pool.add(step.got.values[b, :, real], expected.out[b, :, real], sigma)
    return pool


def assert_rounding_noise(case: Case, made: Run) -> None:
    """The errors of a run have the size and the symmetry of rounding to nearest.

    Raises:
        LawViolation: they are too large, or lean to one side.
    """
    model = made.subject.model(devices.current()).name
    chi = clean_chi(case.dtype, model)
    if chi is None or (case.values, case.gain, case.patches) != ("normal", 0, ()):
        # An arithmetic of which nothing is known, or data whose errors are not noise.
        recorder.tally.not_offered["errors of known size"] += 1
        return
    pool = pooled(made)
    recorder.pooled(f"{case.dtype}, {model}", pool)
    statistics = pool.statistics()
    used, alarms = judge(statistics, chi)
    recorder.tally.calls += 1
    recorder.tally.worst |= Utilisation(out=used)
    if alarms:
        figures = f"chi {statistics.chi:.3g}, bias z {statistics.bias:+.2g}, largest |r| {statistics.largest:.3g}"
        raise LawViolation(
            "noise",
            f"the errors are not rounding noise: {'; '.join(alarms)}\n"
            f"  {figures} over {statistics.outputs} outputs of {statistics.rows} rows\n"
            f"  case: {case!r}",
            case,
        )
