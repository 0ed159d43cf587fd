"""Nothing to attend to is 0 and -inf, never NaN."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from properties.assertions import assert_same_numbers
from properties.case import Case
from properties.checking import assert_no_findings, check_values
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import decoding, with_a_silent_row, with_an_idle_row
from properties.visible import visible_counts


@asks("empty rows")
@given(case=cases(min_rows=1))
def test_a_query_that_sees_no_key_gives_zero_and_minus_infinity(case: Case) -> None:
    """Nor does a query that is padding, of a row that has keys: by the seed there are such rows, and decode steps."""
    case = decoding(case) if case.seed % 4 > 1 else case
    made = run(with_a_silent_row(case) if case.seed % 2 else with_an_idle_row(case))
    assert_no_findings(made, ["raised", "overflow", "result", "lengths"])

    for step in made.steps:
        if step.got is not None:
            blind = visible_counts(step.plan, case.is_causal)[:, None] == 0  # [batch, 1, q_len]
            out = np.where(blind[..., None], step.got.values, 0.0)
            lse = np.where(blind, step.got.lse_values, 0.0)
            assert_same_numbers("out", step.got, out, np.zeros(out.shape), "a query without keys and zero")
            nothing = np.where(blind, -np.inf, np.zeros(lse.shape))
            assert_same_numbers("lse", step.got, lse, nothing, "a query without keys and -inf")


@asks("empty rows")
@given(case=cases(min_rows=2, several_splits=True, ops=("attention_with_kv_cache",)))
def test_an_empty_row_keeps_its_neighbours_splits_apart(case: Case) -> None:
    """Splits that a row does not have add nothing to it: neighbours hold their own numbers."""
    check_values(run(with_an_idle_row(case)))
