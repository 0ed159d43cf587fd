"""An option belongs to the call that was given it, and one that is missing is not guessed."""

from __future__ import annotations

from hypothesis import given

from properties import refusals, retries, subjects
from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import steady

WITH_CACHE = ("attention_with_kv_cache",)


@asks("cache in place", "tiles", "lse", "bits across runs")
@given(case=cases(ops=WITH_CACHE, min_rows=1, min_steps=2, runs=4, overflow=False))
def test_a_call_with_other_options_leaves_nothing_behind(case: Case) -> None:
    """Another scale, mask, tile, layout or plan on the same cache changes no bit of the calls between."""
    case = steady(case)
    among = run(case, retries.among_others(subjects.active(), case))

    assert_same_outputs(among.outputs, run(case).outputs, "a call among others on its cache and alone")


@asks("refusals")
@given(case=cases(ops=WITH_CACHE, overflow=False))
def test_buffers_without_their_lengths_are_refused(case: Case) -> None:
    made = run(case, retries.without_lengths(subjects.active(), case))

    assert_no_findings(made, ["raised", "cache", "inputs", "append"])


@asks("checked arguments")
@given(case=cases(ops=WITH_CACHE, overflow=False))
def test_a_call_that_must_be_refused_is_refused_whatever_was_called_before(case: Case) -> None:
    """One thing wrong in a call that is otherwise like the one before: it raises, and no byte changes."""
    case = steady(case) if case.seed % 2 else case
    among = run(case, refusals.among_malformed(subjects.active(), case))

    assert_no_findings(among, ["raised", "cache", "inputs", "append", "lengths"])
    assert_same_outputs(among.outputs, run(case).outputs, "a call among malformed ones and alone")
