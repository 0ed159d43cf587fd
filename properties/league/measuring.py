"""One problem on the kernel under test: how far each element is off, in budgets, and whether that is too far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from properties import subjects
from properties.assertions import Expected, LawViolation, assert_shapes, error_over_budget
from properties.capabilities import NotOffered
from properties.case import Case
from properties.checking import check_values, expectations
from properties.league.problems import admitted
from properties.runner import Run, run
from properties.subjects import UNKNOWN_BLOCK_N, Subject, permissive
from references.tiling import Tiles, tiling

Ratios = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Measured:
    """What one problem gave.

    Attributes:
        out, lse: error over budget of each element; infinite where it is not a number; None where there is none.
        lean: mean of error / budget of the outputs, an error that makes one larger positive; None where there is no
            number.
        wrong: what is beyond the kernel's own budget, in one line; "" if nothing is.
        not_offered: why it was not run; "" if it was.
    """

    out: Ratios | None = None
    lse: Ratios | None = None
    lean: float | None = None
    wrong: str = ""
    not_offered: str = ""


def measure(case: Case) -> Measured:
    """Run a problem of one call on the active subject."""
    subject = subjects.active()
    try:
        made = run(admitted(case, subject.capabilities), subject)
    except NotOffered as lacking:
        return Measured(not_offered=str(lacking))
    try:
        check_values(made)
        wrong = ""
    except LawViolation as violation:
        wrong = ": ".join(line.strip() for line in violation.report.splitlines()[:2])
    got = made.steps[0].got
    if got is None:
        return Measured(wrong=wrong)
    expected = next(expectations(Run(made.problem, by_one_rule(subject), made.steps)))
    assert expected is not None
    try:
        assert_shapes(got, expected)
    except LawViolation:
        return Measured(wrong=wrong)
    return Measured(
        out=_ratios(got.values, expected.out, expected.out_budget, expected),
        lse=_ratios(got.lse_values, expected.lse, expected.lse_budget, expected) if got.has_lse else None,
        lean=_lean(got.values, expected.out, expected.out_budget),
        wrong=wrong,
    )


def by_one_rule(subject: Subject) -> Subject:
    """The subject with the arithmetic and the tiles of a kernel of which nothing is known: one budget for all."""
    return replace(subject, model=permissive, tiles=_smallest_tiles)


def _smallest_tiles(case: Case, q_len: int, cached: int, new: int) -> Tiles:
    del case, q_len
    return tiling(cached + new, 0, UNKNOWN_BLOCK_N, UNKNOWN_BLOCK_N)


def _ratios(
    got: NDArray[np.float64], right: NDArray[np.float64], budget: NDArray[np.float64], expected: Expected
) -> Ratios:
    free = expected.overflow_free
    _, ratio = error_over_budget(got, right, budget, free[..., None] if got.ndim > free.ndim else free)
    with np.errstate(over="ignore"):
        return ratio.ravel().astype(np.float32)


def _lean(got: NDArray[np.float64], right: NDArray[np.float64], budget: NDArray[np.float64]) -> float | None:
    with np.errstate(divide="ignore", invalid="ignore"):
        signed = (got - right) * np.sign(right) / budget
    signed = signed[np.isfinite(signed)]
    return float(signed.mean()) if signed.size else None
