"""What no bound can see: rounding in the wrong direction, partial sums kept too narrow, drift."""

from __future__ import annotations

from hypothesis import given

from properties.alarming import assert_no_alarm_comes_back
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


@asks("declared arithmetic")
@given(case=noise_cases(("float16", "bfloat16", "float32")))
def test_no_alarm_comes_back_on_fresh_data(case: Case) -> None:
    """Errors are as small as independent roundings are likely to be, or it was chance: 3 of 5 fresh draws decide."""
    assert_no_alarm_comes_back(case)
