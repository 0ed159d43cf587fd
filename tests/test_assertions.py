"""The comparisons can fail: each of these breaks one thing and sees it reported."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from properties.assertions import (
    Expected,
    Got,
    LawViolation,
    assert_same_bits,
    assert_same_outputs,
    assert_within_budget,
    describe,
)
from properties.case import Case, Row, Step
from references.rounding import encode

CASE = Case(rows=(Row(0, (4,)), Row(0, (4,))), num_kv_heads=1, group_size=2, head_dim=3, dtype="float16", block_n=16)
SHAPE = (2, 2, 4, 3)


def got(out: np.ndarray, lse: np.ndarray | None = None, fresh: int | None = None) -> Got:
    lse = np.zeros(out.shape[:3]) if lse is None else lse
    return Got(encode(out, "float16"), encode(lse, "float32"), "float16", CASE, fresh=fresh)


def expected(out: np.ndarray, budget: float = 0.25, lse_budget: float = 0.25) -> Expected:
    lse = np.zeros(out.shape[:3])
    terms = {"P": np.full(out.shape, budget / 4), "output rounding": np.full(out.shape, 3 * budget / 4)}
    return Expected(
        out,
        lse,
        np.full(out.shape, budget),
        np.full(lse.shape, lse_budget),
        np.ones(lse.shape, np.bool_),
        terms,
        {"logit": np.full(lse.shape, lse_budget)},
    )


def test_an_error_within_the_budget_passes_and_its_share_is_returned() -> None:
    used = assert_within_budget(got(np.full(SHAPE, 0.125)), expected(np.zeros(SHAPE)))

    assert (used.out, used.lse) == (0.5, 0.0)


def test_an_error_of_the_whole_budget_passes_and_one_step_more_fails() -> None:
    limit = np.full(SHAPE, 0.25)
    assert assert_within_budget(got(limit), expected(np.zeros(SHAPE))).out == 1.0

    limit[1, 0, 2, 1] = np.nextafter(np.float16(0.25), np.float16(1))
    with pytest.raises(LawViolation, match="out exceeds its error budget in 1 of 48 elements"):
        assert_within_budget(got(limit), expected(np.zeros(SHAPE)))


def test_the_report_says_what_where_how_much_and_on_what() -> None:
    out = np.zeros(SHAPE)
    out[1, 0, 3, 2] = 0.5

    with pytest.raises(LawViolation) as failure:
        assert_within_budget(got(out), expected(np.zeros(SHAPE)))

    assert failure.value.report.splitlines() == [
        "out exceeds its error budget in 1 of 48 elements",
        "  worst at [batch=1, head=0, q=3, d=2]: expected 0x0p+0, got 0x1p-1",
        "  error 5.0e-01 = 2.0 x budget 2.5e-01 (output rounding 1.9e-01 + P 6.2e-02)",
        "  case: batch=2, cached=[0, 0], new=[4, 4], heads 2:1, head_dim=3, float16, block_n=16, zeros values",
    ]
    assert failure.value.kind == "out"
    assert failure.value.case == CASE
    assert failure.value.sightings[0].index == (1, 0, 3, 2)


def test_lse_is_checked_as_hard_as_out() -> None:
    lse = np.zeros(SHAPE[:3])
    lse[0, 1, 2] = 0.5

    with pytest.raises(LawViolation, match=r"lse exceeds .* 1 of 16(?s:.*)\[batch=0, head=1, q=2\](?s:.*)logit"):
        assert_within_budget(got(np.zeros(SHAPE), lse), expected(np.zeros(SHAPE)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(wrong: float) -> None:
    out = np.zeros(SHAPE)
    out[0, 0, 0, 0] = wrong
    huge = expected(np.zeros(SHAPE), budget=1e300, lse_budget=np.inf)

    with pytest.raises(LawViolation, match="not a finite number"):
        assert_within_budget(got(out), huge)


def test_nan_in_lse_never_passes_where_minus_infinity_is_expected() -> None:
    nothing_seen = expected(np.zeros(SHAPE))
    nothing_seen.lse[...] = -np.inf
    nothing_seen.lse_budget[...] = 0.0

    assert assert_within_budget(got(np.zeros(SHAPE), nothing_seen.lse), nothing_seen).lse == 0.0
    for wrong in (np.nan, 0.0, np.inf):
        with pytest.raises(LawViolation, match="lse exceeds"):
            assert_within_budget(got(np.zeros(SHAPE), np.full(SHAPE[:3], wrong)), nothing_seen)


def test_a_visible_nan_must_reach_the_output() -> None:
    poisoned = expected(np.zeros(SHAPE))
    poisoned.out[0, 0] = np.nan
    poisoned.out_budget[0, 0] = np.nan
    out = np.zeros(SHAPE)
    out[0, 0] = np.inf

    assert_within_budget(got(out), poisoned)
    with pytest.raises(LawViolation, match="12 of 48"):
        assert_within_budget(got(np.zeros(SHAPE)), poisoned)


def test_a_kernel_may_overflow_only_where_it_cannot_be_ruled_out() -> None:
    out = np.zeros(SHAPE)
    out[0, 0, 0, 0] = np.inf
    may = expected(np.zeros(SHAPE))
    may.overflow_free[0, 0, 0] = False

    assert_within_budget(got(out), may)
    out[0, 0, 0, 0] = 1.0  # finite, so it must be right
    with pytest.raises(LawViolation):
        assert_within_budget(got(out), may)


def test_an_exact_element_must_be_exact() -> None:
    exact = expected(np.zeros(SHAPE), budget=0.0)
    out = np.zeros(SHAPE)
    assert assert_within_budget(got(out), exact).out == 0.0

    out[0, 0, 0, 0] = 2.0**-24
    with pytest.raises(LawViolation, match="must be exact"):
        assert_within_budget(got(out), exact)


def test_wrong_shapes_fail_even_if_they_would_broadcast() -> None:
    with pytest.raises(LawViolation, match="out has the wrong shape"):
        assert_within_budget(got(np.zeros((2, 2, 1, 3))), expected(np.zeros(SHAPE)))
    with pytest.raises(LawViolation, match="lse has the wrong shape"):
        assert_within_budget(got(np.zeros(SHAPE), np.zeros((2, 2, 1))), expected(np.zeros(SHAPE)))


def test_swapped_arguments_are_an_error() -> None:
    one, other = got(np.zeros(SHAPE)), expected(np.zeros(SHAPE))

    with pytest.raises(TypeError, match="got must be a Got and expected an Expected"):
        assert_within_budget(other, one)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a Got"):
        assert_same_bits(one, other)  # type: ignore[arg-type]


def test_comparing_nothing_is_an_error() -> None:
    nothing = (0, 2, 4, 3)

    with pytest.raises(ValueError, match="nothing to compare"):
        assert_within_budget(got(np.zeros(nothing)), expected(np.zeros(nothing)))
    with pytest.raises(ValueError, match="nothing to compare"):
        assert_same_bits(got(np.zeros(nothing)), got(np.zeros(nothing)))


@pytest.mark.parametrize("budget", [-1.0, -np.inf])
def test_a_negative_budget_is_an_error(budget: float) -> None:
    with pytest.raises(ValueError, match="must be non-negative"):
        assert_within_budget(got(np.zeros(SHAPE)), expected(np.zeros(SHAPE), budget=budget))


def test_same_bits_pass_and_one_bit_fails() -> None:
    one = got(np.ones(SHAPE))
    assert_same_bits(one, got(np.ones(SHAPE)))

    for name in ("out", "lse"):
        other = got(np.ones(SHAPE))
        getattr(other, name)[1, 1, 0] ^= 1
        with pytest.raises(LawViolation, match=rf"{name} of the two runs differs in [13] of") as failure:
            assert_same_bits(one, other)
        assert [sighting.index[:3] for sighting in failure.value.sightings] == [(1, 1, 0), (1, 1, 0)]


def test_zeros_of_both_signs_are_not_the_same_bits() -> None:
    with pytest.raises(LawViolation, match=r"0x0p\+0 \(0x0000\) and -0x0p\+0 \(0x8000\)"):
        assert_same_bits(got(np.zeros(SHAPE)), got(-np.zeros(SHAPE)))


def test_memory_never_written_is_not_the_same_bits_as_itself() -> None:
    unwritten = got(np.ones(SHAPE), fresh=0x7E2A)
    unwritten.out[0, 1, 2, 0] = 0x7E2A

    with pytest.raises(LawViolation, match=r"never written in 1 of 48(?s:.*)\[batch=0, head=1, q=2, d=0\]"):
        assert_same_bits(unwritten, unwritten)


def test_a_selection_knows_where_its_elements_were() -> None:
    out = np.arange(48.0).reshape(SHAPE)
    one, other = got(out), got(out[::-1])
    assert_same_bits(one.rows([1, 0]).heads(1), other.heads(1))

    other.out[0, 1, 3, 2] ^= 1
    with pytest.raises(LawViolation, match=r"\[batch=1, head=1, q=3, d=2\] and \[batch=0, head=1, q=3, d=2\]"):
        assert_same_bits(one.rows([1, 0]).heads(1).queries(slice(2, 4)), other.heads(1).queries(slice(2, 4)))


def test_selections_of_different_shape_are_an_error() -> None:
    one = got(np.zeros(SHAPE))

    with pytest.raises(ValueError, match="one shape and format"):
        assert_same_bits(one, one.rows(0))
    with pytest.raises(ValueError, match="as many calls"):
        assert_same_outputs([one], [one, one])


def test_a_violation_survives_the_way_between_processes() -> None:
    with pytest.raises(LawViolation) as failure:
        assert_within_budget(got(np.full(SHAPE, np.nan)), expected(np.zeros(SHAPE)))
    travelled = pickle.loads(pickle.dumps(failure.value))

    assert (travelled.kind, travelled.report) == (failure.value.kind, failure.value.report)
    assert (travelled.case, travelled.sightings) == (failure.value.case, failure.value.sightings)


def test_a_case_is_described_in_one_line() -> None:
    schedule = Case(rows=(Row(0, (3, 1)),), steps=(Step(), Step()), is_causal=True, scale=0.5, values="normal")
    plain = replace(CASE, op="attention", rows=(Row(17, (1,)),))

    assert describe(schedule, 1) == (
        "batch=1, cached=0, new=[3, 1], step 2 of 2, heads 1:1, head_dim=16, float32, causal, scale=0.5, normal values"
    )
    assert describe(plain).startswith("batch=1, q_len=1, kv_len=17, heads 2:1, head_dim=3, float16, block_n=16")
