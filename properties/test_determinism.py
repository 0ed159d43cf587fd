"""A call's result follows from its arguments: not from what ran before, nor from how often it is asked."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given

from properties import callers, subjects
from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import steady, with_cache


@asks("bits across runs")
@given(case=cases(runs=3))
def test_running_twice_gives_the_same_bits(case: Case) -> None:
    assert_same_outputs(run(case).outputs, run(case).outputs, "the first and the second run")


@asks("cache in place", "bits across runs")
@given(case=cases(runs=3))
def test_repeating_a_call_on_the_same_cache_changes_nothing(case: Case) -> None:
    repeated = run(case, callers.repeating(subjects.active()))

    assert_same_outputs(repeated.outputs, run(case).outputs, "a repeated call and a single one")
    assert_no_findings(repeated, ["append", "cache", "lengths", "inputs"])


@asks("bits across runs")
@given(case=cases(runs=3))
def test_other_calls_in_between_change_nothing(case: Case) -> None:
    """No workspace, counter or plan of another shape, scale or dtype survives into a call."""
    interleaved = run(case, callers.interleaved(subjects.active()))

    assert_same_outputs(interleaved.outputs, run(case).outputs, "calls with others in between and without")


@asks("bits across runs")
@given(case=cases(ops=("attention_with_kv_cache",), min_rows=2, runs=3))
def test_how_lengths_are_stored_does_not_matter(case: Case) -> None:
    plain = run(case).outputs
    for dtype in (torch.int32, torch.int64):
        other = run(case, callers.with_lengths_as(subjects.active(), dtype)).outputs

        assert_same_outputs(other, plain, f"lengths as strided {dtype} and as plain integers")


@asks("cache in place", "bits across runs")
@given(case=cases(ops=("attention_with_kv_cache",), min_rows=2, min_steps=2, runs=3, overflow=False))
def test_how_a_cache_holds_its_lengths_does_not_matter(case: Case) -> None:
    """As integers of any width and stride: no later call takes its own for those of the first one."""
    case = with_cache(case)
    case = steady(replace(case, start="kv_cache", capacity=max(1, case.capacity)))
    plain = run(case).outputs
    for dtype in (torch.int32, torch.int64):
        other = run(case, callers.with_lengths_held_as(subjects.active(), dtype)).outputs

        assert_same_outputs(other, plain, f"a cache with lengths as strided {dtype} and as plain integers")
