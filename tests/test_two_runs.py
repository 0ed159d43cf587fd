"""Comparing two runs can fail too: results, caches and calls that differ are told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from properties import callers, subjects
from properties.assertions import LawViolation, assert_differ, assert_near, assert_same_numbers, assert_same_outputs
from properties.case import Case, Row, Step
from properties.checking import check_run
from properties.exact import assert_exact
from properties.exploring import failure_of
from properties.halves import merged
from properties.recording import repeated
from properties.runner import run
from properties.sequences import assert_close_sequences, assert_same_caches, assert_same_sequences
from properties.subjects import Subject, naive
from properties.variants import as_single_prefill, as_single_tokens, on_the_lattice
from tests.test_assertions import SHAPE, got

NAIVE = subjects.load("properties.subjects.naive:attention_with_kv_cache")
CASE = Case(
    rows=(Row(3, (2, 1)), Row(0, (1, 1), 1)),
    steps=(Step(padding=1), Step()),
    num_kv_heads=2,
    group_size=2,
    dtype="float16",
    is_causal=True,
    start="kv_cache",
    capacity=8,
    cache_max_len=8,
    values="normal",
)


def near(first: Any, second: Any, allowed: float = 0.25, comparable: bool = True) -> None:
    zeros = np.zeros(SHAPE)
    budget, mask = np.full(SHAPE, allowed), np.full(SHAPE, comparable)
    assert_near("out", got(zeros), zeros + first, zeros + second, budget, mask, "the two runs")


def test_near_is_at_most_the_budget() -> None:
    near(1.0, 1.25)
    near(-np.inf, -np.inf)
    with pytest.raises(LawViolation, match=r"differs by more than allowed in 48 of 48 .*\n.* 2.6e-01 apart, allowed"):
        near(1.0, 1.26)


@pytest.mark.parametrize("pair", [(np.nan, 0.0), (np.nan, np.nan), (np.inf, 0.0), (np.inf, -np.inf)])
def test_what_is_not_finite_is_near_only_where_a_kernel_may_overflow(pair: tuple[float, float]) -> None:
    near(*pair, comparable=False)
    with pytest.raises(LawViolation, match="differs by more than allowed"):
        near(*pair)


def test_a_comparison_of_two_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="both sides must have one shape"):
        near(np.zeros((3, *SHAPE)), 0.0)


def test_the_same_numbers_have_no_sign_of_zero() -> None:
    zeros = np.zeros(SHAPE)
    assert_same_numbers("out", got(zeros), zeros, -zeros, "zeros")
    with pytest.raises(LawViolation):
        assert_same_numbers("out", got(zeros), zeros, zeros + 2.0**-40, "zeros")


def test_an_argument_without_effect_is_a_violation() -> None:
    one, other = got(np.zeros(SHAPE)), got(np.ones(SHAPE))
    assert_differ([one], [other], "the scale")
    with pytest.raises(LawViolation, match="the scale changes no bit of any result"):
        assert_differ([one, other], [one, other], "the scale")


def test_sequences_of_the_same_tokens_are_compared_token_by_token() -> None:
    steps, lattice = run(CASE, NAIVE), on_the_lattice(CASE)
    for other in (as_single_prefill, as_single_tokens):
        assert_close_sequences(steps, run(other(CASE), NAIVE), "two ways")
        assert_same_sequences(run(lattice, NAIVE), run(other(lattice), NAIVE), "two ways")
        assert_same_caches(steps, run(other(CASE), NAIVE))

    with pytest.raises(LawViolation, match="out of two ways differs by more than allowed"):
        assert_close_sequences(steps, run(replace(as_single_prefill(CASE), seed=1), NAIVE), "two ways")
    with pytest.raises(LawViolation, match="the bits must be the same"):
        assert_same_sequences(steps, run(replace(as_single_prefill(CASE), seed=1), NAIVE), "two ways")
    with pytest.raises(LawViolation, match="k_cache differs between two ways to fill it"):
        assert_same_caches(steps, run(replace(as_single_prefill(CASE), seed=1), NAIVE))


def test_a_bit_off_the_lattice_is_seen() -> None:
    made = run(on_the_lattice(CASE), NAIVE)
    step = made.steps[1].got
    assert step is not None
    assert_exact(made, 2.0**-24)

    step.out[1, 2, 0, 3] ^= 1
    with pytest.raises(LawViolation, match=r"out of the kernel and integer arithmetic .*\n.*batch=1, head=2, q=0, d=3"):
        assert_exact(made, 2.0**-24)


@pytest.mark.parametrize(
    "caller",
    [
        callers.repeating,
        callers.interleaved,
        callers.unaligned,
        lambda subject: callers.with_lengths_as(subject, torch.int64),
    ],
)
def test_a_correct_kernel_may_be_called_in_any_way(caller: Any) -> None:
    disturbed = run(CASE, caller(NAIVE))

    check_run(disturbed)
    assert_same_outputs(disturbed.outputs, run(CASE, NAIVE).outputs)
    assert all(got.is_transformed for got in disturbed.outputs)


def called(function: Any) -> Subject:
    return replace(NAIVE, attention_with_kv_cache=function)


def test_callers_call_as_they_say() -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def spy(*tensors: Any, **options: Any) -> Any:
        calls.append((tensors, options))
        return naive.attention_with_kv_cache(*tensors, **options)

    case = replace(CASE, start="tuple", steps=(Step(), Step(rollback=1)))
    run(case, callers.repeating(called(spy)))
    assert len(calls) == 4
    calls.clear()
    run(case, callers.interleaved(called(spy)))
    assert [tensors[0].shape[3] for tensors, _ in calls] == [24, 64, 16] * 2
    calls.clear()
    run(case, callers.with_lengths_as(called(spy), torch.int64))
    assert [(o["seq_lens"].dtype, o["seq_lens"].stride()) for _, o in calls] == [(torch.int64, (2,))] * 2
    calls.clear()
    run(case, callers.unaligned(called(spy)))
    assert all(tensor.data_ptr() % 16 for tensors, _ in calls for tensor in tensors)


@pytest.mark.parametrize("what", ["all", "cache", "new"])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1)])
def test_far_tensors_span_more_than_two_to_the_31_elements(axes: tuple[int, ...], what: str) -> None:
    spans: list[int] = []

    def spy(*tensors: Any, **options: Any) -> Any:
        for tensor in (*tensors, *options["past_key_value"]):
            spans.append(sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)))
        return naive.attention_with_kv_cache(*tensors, **options)

    case = replace(CASE, rows=tuple(replace(row, new=row.new[:1]) for row in CASE.rows), steps=(Step(),))
    far = run(case, callers.far_apart(called(spy), axes, what))

    assert_same_outputs(far.outputs, run(case, NAIVE).outputs)
    assert [span > 2**31 for span in spans] == [what != "cache"] * 3 + [what != "new"] * 2


def test_far_tokens_pass_two_to_the_31_at_the_place_asked_for() -> None:
    strides: list[int] = []

    def spy(*tensors: Any, **options: Any) -> Any:
        strides.extend(buffer.stride(2) for buffer in options["past_key_value"])
        return naive.attention_with_kv_cache(*tensors, **options)

    case = replace(CASE, rows=(Row(9, (1,)),), steps=(Step(),), start="tuple", capacity=10)
    run(case, callers.far_apart(called(spy), (2,), "cache", 4))

    assert [3 * stride < 2**31 <= 4 * stride for stride in strides] == [True, True]


def test_lengths_of_far_rows_lie_far_apart_too() -> None:
    places: list[int] = []

    def spy(*tensors: Any, **options: Any) -> Any:
        places.extend((len(options[name]) - 1) * options[name].stride(0) for name in ("seq_lens", "new_lens"))
        return naive.attention_with_kv_cache(*tensors, **options)

    case = replace(CASE, rows=(Row(2, (1,)), Row(3, (2,)), Row(1, (0,))), steps=(Step(),), start="tuple", capacity=5)
    run(case, callers.far_apart(called(spy), (0,), "new"))

    assert [place >= 2**31 for place in places] == [True, True]


def test_a_result_that_changes_after_some_repeats_is_seen() -> None:
    count = 0

    def tires(*tensors: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        out, cache, lse = naive.attention_with_kv_cache(*tensors, **options)
        return (out + 1 if count == 7 else out), cache, lse

    case = replace(CASE, rows=(Row(3, (2,)),), steps=(Step(),))
    steady, tired = list(repeated(case, NAIVE, 10)), list(repeated(case, called(tires), 10))

    assert len(steady) == 1
    assert len(tired) == 2
    with pytest.raises(LawViolation, match="the bits must be the same"):
        assert_same_outputs([first for first, _ in tired], [other for _, other in tired])


def test_what_happens_on_a_variant_is_not_shown_by_the_case_alone() -> None:
    violation = LawViolation("out", "report", replace(CASE, seed=3))

    assert failure_of("law", CASE, violation).elsewhere
    assert not failure_of("law", replace(CASE, seed=3), violation).elsewhere
    assert failure_of("law", CASE, LawViolation("out", "report", None)).elsewhere


def test_halves_of_which_one_has_no_number_for_a_log_sum_exp_are_no_number() -> None:
    """A kernel whose half is NaN must not pass because the whole is 0."""
    lse = np.zeros(SHAPE[:3])
    lse[0, 0] = np.nan
    lse[0, 1] = -np.inf
    half, zeros = got(np.zeros(SHAPE), lse), got(np.zeros(SHAPE))

    for out, merged_lse in (merged(half, zeros), merged(zeros, half)):
        assert np.isnan(out[0, 0]).all()
        assert np.isnan(merged_lse[0, 0]).all()
        assert np.all(out[0, 1] == 0)
        assert np.all(merged_lse[0, 1] == 0)
        assert np.all(out[1] == 0)
