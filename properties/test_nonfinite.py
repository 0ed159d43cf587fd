"""NaN and infinities reach what sees them, and nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from properties.assertions import LawViolation, assert_same_numbers, describe
from properties.case import Case
from properties.checking import expected_outputs
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import finite, with_own_heads
from properties.visible import reached_by


@asks("visible NaN", "bits across runs")
@given(case=cases(non_finite=True, families=("normal", "integers", "rising"), runs=2))
def test_a_non_finite_key_or_value_reaches_exactly_the_outputs_that_see_it(case: Case) -> None:
    case = with_own_heads(case)
    made, clean = run(case), run(finite(case)).outputs
    steps = [step for step in made.steps if step.got is not None]

    for step, (got, expected), plain in zip(steps, expected_outputs(made), clean, strict=True):
        out, lse = reached_by(case, step.plan)
        finite_out, finite_lse = np.where(out, 0.0, got.values), np.where(lse, 0.0, got.lse_values)
        assert_same_numbers("out", got, finite_out, np.where(out, 0.0, plain.values), "outputs that do not see it")
        assert_same_numbers("lse", got, finite_lse, np.where(lse, 0.0, plain.lse_values), "rows that do not see it")
        hidden = np.argwhere(~np.isfinite(expected.out) & np.isfinite(got.values))
        if len(hidden):
            report = f"out hides a visible NaN or infinity, first at {hidden[0].tolist()}\n  case: {describe(case)}"
            raise LawViolation("hidden", report, case)
