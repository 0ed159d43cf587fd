"""An option belongs to the call that was given it, and one that is missing is not guessed."""

from __future__ import annotations

from hypothesis import given

from properties import refusals, retries, spellings, subjects
from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import decoding, steady

WITH_CACHE = ("attention_with_kv_cache",)


@asks("cache in place", "tiles", "lse", "bits across runs")
@given(case=cases(ops=WITH_CACHE, min_rows=1, min_steps=2, runs=4, overflow=False))
def test_a_call_with_other_options_leaves_nothing_behind(case: Case) -> None:
    """Another scale, mask, tile or layout on the same cache changes no bit of the calls between."""
    case = steady(case)
    among = run(case, retries.among_others(subjects.active(), case))

    assert_same_outputs(among.outputs, run(case).outputs, "a call among others on its cache and alone")


@asks("cache in place", "tiles", "bits across runs")
@given(case=cases(ops=WITH_CACHE, min_rows=1, min_steps=2, several_splits=True, runs=5, overflow=False))
def test_a_call_with_another_kernel_leaves_nothing_behind(case: Case) -> None:
    """No split, a split a tile, or two: whichever was forced before on the same cache, the bits are those asked for."""
    case = decoding(steady(case))
    among, alone = retries.among_plans(subjects.active(), case)

    outputs = run(case, among).outputs
    assert_same_outputs(outputs, run(case, alone).outputs, "a call after others with each kernel and alone")


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


@asks("checked arguments")
@given(case=cases(ops=("attention",)))
def test_attention_without_a_cache_refuses_what_it_must(case: Case) -> None:
    among = run(case, refusals.among_malformed(subjects.active(), case))

    assert_no_findings(among, ["raised", "inputs"])
    assert_same_outputs(among.outputs, run(case).outputs, "a call among malformed ones and alone")


@asks("bits across runs")
@given(case=cases(runs=3))
def test_asking_for_the_lse_changes_no_bit_of_the_output(case: Case) -> None:
    without = run(case, spellings.without_lse(subjects.active()))

    assert_same_outputs(without.outputs, run(case).outputs, "a call without return_lse and with")
    assert_no_findings(without, ["append", "cache", "guard", "lengths", "inputs"])


@asks("checked arguments", "bits across runs")
@given(case=cases(runs=2))
def test_arguments_spelled_out_change_nothing(case: Case) -> None:
    """Lengths, scale and numbers of heads that say what is so anyway."""
    spelled = run(case, spellings.spelled_out(subjects.active()))

    assert_same_outputs(spelled.outputs, run(case).outputs, "a call with all its arguments and one with defaults")
    assert_no_findings(spelled, ["append", "cache", "lengths", "inputs"])


@asks("cache in place", "bits across runs")
@given(case=cases(ops=WITH_CACHE, runs=3, overflow=False))
def test_a_peek_gives_what_the_call_gives(case: Case) -> None:
    """update_cache=False has the numbers of the call that stores, and leaves no trace."""
    peeked = run(case, spellings.peeked(subjects.active()))

    assert_same_outputs(peeked.outputs, run(case).outputs, "a peek and the call")
    assert_no_findings(peeked, ["append", "cache", "lengths", "inputs", "guard"])
