"""What no bound can see: rounding in the wrong direction, partial sums kept too narrow, drift."""

from __future__ import annotations

from hypothesis import given

from properties.case import Case
from properties.needs import asks
from properties.pooling import assert_rounding_noise
from properties.runner import run
from properties.strategies.noise import noise_cases


@asks("declared arithmetic")
@given(case=noise_cases())
def test_errors_look_like_rounding_noise(case: Case) -> None:
    """Over thousands of outputs the errors have the size and the symmetry of rounding to nearest."""
    assert_rounding_noise(case, run(case))
