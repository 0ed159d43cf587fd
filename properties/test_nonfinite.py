"""NaN and infinities reach what sees them, and nothing else."""

from __future__ import annotations

from hypothesis import given

from properties.case import Case
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import finite, with_own_heads
from properties.visible import assert_reaches_what_sees_it


@asks("visible NaN", "bits across runs")
@given(case=cases(non_finite=True, families=("normal", "integers", "rising"), runs=2))
def test_a_non_finite_key_or_value_reaches_exactly_the_outputs_that_see_it(case: Case) -> None:
    case = with_own_heads(case)

    assert_reaches_what_sees_it(run(case), run(finite(case)).outputs)
