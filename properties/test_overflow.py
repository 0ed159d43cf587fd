"""Capacity is a limit that is kept to the slot."""

from __future__ import annotations

from hypothesis import given

from properties import callers, subjects
from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings, check_run
from properties.needs import asks
from properties.recording import with_a_bad_length
from properties.runner import run
from properties.strategies import cases
from properties.variants import growing, limits_around, one_call, steady, then_again, with_cache


@asks("overflow")
@given(case=cases(ops=("attention_with_kv_cache",), min_rows=2, runs=3))
def test_a_row_fits_to_its_last_slot_and_not_one_further(case: Case) -> None:
    """At the limit a row needs, one slot above and one below: refused whole or done whole, whichever row it is.

    By the seed the calls are alike, so that the one that passes the limit looks like a call to repeat.
    """
    for limited in limits_around(steady(case) if case.seed % 2 else case):
        check_run(run(limited))


@asks("overflow", "bits across runs")
@given(case=cases(ops=("attention_with_kv_cache",), min_rows=1, runs=3))
def test_a_call_after_an_overflow_works(case: Case) -> None:
    """A refused call leaves the cache as it was: the next valid one gives what it would have given."""
    first = one_call(case)
    refused, valid = run(then_again(first, refuse_first=True)), run(then_again(first, refuse_first=False))

    assert_same_outputs(refused.outputs[-1:], valid.outputs[-1:], "a call after an overflow and without")


@asks("cache in place", "overflow", "device checks", "bits across batches")
@given(case=cases(ops=("attention_with_kv_cache",), min_rows=1, runs=2, overflow=False))
def test_a_length_that_the_host_cannot_see_is_checked_by_the_device(case: Case) -> None:
    """As in a replayed CUDA graph: the row stays as it is, the others go on, and the cache reports it."""
    case = one_call(with_cache(case))
    if case.rows and case.steps[0].padding + max(row.new[0] for row in case.rows):
        for got, expected in with_a_bad_length(case, subjects.active()):
            assert_same_outputs([got], [expected], "a call with a bad length and one without")


@asks("cache in place")
@given(case=cases(ops=("attention_with_kv_cache",), min_rows=1, runs=2, overflow=False))
def test_growth_at_least_doubles_and_keeps_every_token(case: Case) -> None:
    """Up to the limit and not past it; as often as it is needed and not more."""
    case = growing(case)
    made = run(case)
    check_run(made)

    least = min(case.cache_max_len, 2 * case.capacity)
    for step in made.steps:
        if step.k_bits is not None:
            slots = step.k_bits.shape[2]
            assert slots == case.capacity or slots >= least, f"buffers grew from {case.capacity} slots to {slots}"


@asks("cache in place", "bits across runs")
@given(case=cases(ops=("attention_with_kv_cache",), min_rows=1, min_steps=4, runs=3, overflow=False))
def test_repeating_a_call_that_grows_the_buffers_changes_nothing(case: Case) -> None:
    """The old buffers and the new ones stay apart, though every call on them looks like the one before."""
    case = growing(steady(case))
    repeated = run(case, callers.repeating(subjects.active()))

    assert_same_outputs(repeated.outputs, run(case).outputs, "calls on growing buffers, each made twice and once")
    assert_no_findings(repeated, ["append", "cache", "guard", "lengths", "inputs"])
