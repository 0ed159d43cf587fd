"""The three formats compute one function."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from properties.assertions import assert_close
from properties.case import Case
from properties.checking import expected_outputs
from properties.runner import run
from properties.schedule import problem
from properties.strategies import cases
from properties.transformations import in_format
from properties.variants import moderate


@given(case=cases(families=("integers", "iota", "lattice", "normal"), runs=3))
def test_the_formats_agree_within_the_sum_of_their_budgets(case: Case) -> None:
    """The same numbers, exact in all three."""
    given = problem(replace(moderate(case), dtype="bfloat16"))
    wide = expected_outputs(run(in_format(given, "float32")))

    for dtype in ("float16", "bfloat16"):
        narrow = expected_outputs(run(in_format(given, dtype)))
        for (one, allowed), (other, also) in zip(wide, narrow, strict=True):
            assert_close(one, other, (allowed, also), f"float32 and {dtype}")
