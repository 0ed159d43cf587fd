"""The output is a weighted mean of the visible values: what that implies, whatever the weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from properties.assertions import assert_near, assert_same_bits, assert_same_numbers
from properties.case import Case
from properties.checking import expected_outputs
from properties.needs import asks
from properties.runner import run
from properties.schedule import problem
from properties.strategies import cases
from properties.transformations import changed, keys_of, negated, scaled, with_one_dominant_key, with_scale
from properties.variants import MODERATE, finite, moderate, one_call, with_one_key, with_power_of_two_keys, with_values
from properties.visible import visible_values
from references.rounding import as_format, decode, encode


@given(case=cases(families=("constant_values",)))
def test_constant_values_come_back(case: Case) -> None:
    """Whatever the weights, they sum to one."""
    made = run(finite(with_values(case, "constant_values")))

    for step, (got, allowed) in zip((s for s in made.steps if s.got), expected_outputs(made), strict=True):
        if case.rows and got.out.size:
            low, high, sees = visible_values(made, step)
            assert_near("out", got, got.values, low * sees, allowed.out_budget, allowed.overflow_free[..., None], "V")
            assert np.array_equal(low, high)


@given(case=cases())
def test_every_output_lies_in_the_hull_of_the_visible_values(case: Case) -> None:
    made = run(finite(case))

    for step, (got, allowed) in zip((s for s in made.steps if s.got), expected_outputs(made), strict=True):
        low, high, _ = visible_values(made, step)
        nearest = np.clip(got.values, low, high)
        comparable = allowed.overflow_free[..., None]
        assert_near("out", got, got.values, nearest, allowed.out_budget, comparable, "an output and the hull")


@asks("exact results")
@given(case=cases(max_steps=1))
def test_a_dominant_key_gives_its_value(case: Case) -> None:
    """One key more than 150 octaves above the others: its value comes back bit for bit.

    Keys before it have weights near one until it is met, so that a sum of their values must not overflow.
    """
    given, winners = with_one_dominant_key(problem(finite(one_call(case))))

    for got, allowed in expected_outputs(run(given)):
        for b, new in enumerate(given.steps[0].new_lens):
            row = got.rows(b).queries(slice(new))
            value = decode(keys_of(given, b)[1], case.dtype)[:, winners[b]] if winners[b] is not None else None
            if value is not None and row.out.size:
                expected = np.repeat(value, case.group_size, axis=0)[None, :, None]
                comparable = allowed.overflow_free[b, None, :, :new, None]
                sees = np.isfinite(row.lse_values)[..., None] & comparable
                wanted = np.where(sees, np.broadcast_to(expected, row.values.shape), 0.0)
                comparison = "the output and the only value that counts"
                assert_same_numbers("out", row, np.where(comparable, row.values, 0.0), wanted, comparison)


@asks("exact results")
@given(case=cases(max_steps=1))
def test_one_key_gives_its_value(case: Case) -> None:
    given = problem(with_one_key(case))

    for got in run(given).outputs:
        if case.rows and got.out.size:
            value = decode(keys_of(given, 0)[1], case.dtype)  # [num_kv_heads, 1, head_dim]
            row = got.rows(0)
            sees = np.isfinite(row.lse_values)[..., None]
            wanted = np.where(sees, np.repeat(value, case.group_size, axis=0)[None], 0.0)
            assert_same_numbers("out", row, row.values, wanted, "the output and the only value")


@asks("exact results")
@given(case=cases(max_steps=1, families=("integers",)))
def test_equal_logits_over_a_power_of_two_of_keys_give_the_exact_mean(case: Case) -> None:
    given = changed(problem(with_values(with_power_of_two_keys(case), "integers")), {"query": np.zeros_like})

    for got in run(given).outputs:
        for b, new in enumerate(given.steps[0].new_lens):
            row = got.rows(b).queries(slice(new))
            if row.out.size:
                value = decode(keys_of(given, b)[1], case.dtype)
                mean = np.repeat(value.mean(axis=1), case.group_size, axis=0)[None, :, None]
                rounded = decode(encode(mean, case.dtype), case.dtype) + np.zeros(row.values.shape)
                assert_same_numbers("out", row, row.values, rounded, "the output and the mean")


@asks("exact results")
@given(case=cases(families=MODERATE, runs=2))
def test_scaling_values_by_a_power_of_two_scales_the_output(case: Case) -> None:
    """Bit for bit, where the smaller output is no subnormal number."""
    given, exponent = problem(moderate(case)), 1 + case.seed % 3

    for got, larger in zip(run(given).outputs, run(scaled(given, "value", exponent)).outputs, strict=True):
        subnormal = np.abs(got.values) < as_format(case.dtype).smallest_normal
        wanted = np.where(subnormal, larger.values, np.ldexp(got.values, exponent))
        assert_same_numbers("out", larger, larger.values, wanted, "larger values and scaled outputs")
        assert_same_numbers("lse", larger, larger.lse_values, got.lse_values, "larger values and plain ones")


@asks("exact results")
@given(case=cases(runs=2))
def test_negating_values_negates_the_output(case: Case) -> None:
    given = problem(finite(case))

    for got, other in zip(run(given).outputs, run(negated(given, "value")).outputs, strict=True):
        overflown = np.isnan(got.values) & np.isnan(other.values)
        wanted = np.where(overflown, 0.0, -got.values)
        assert_same_numbers("out", other, np.where(overflown, 0.0, other.values), wanted, "negated values and outputs")
        assert_same_numbers("lse", other, other.lse_values, got.lse_values, "negated values and plain ones")


@asks("exact results")
@given(case=cases(families=MODERATE, runs=3))
def test_a_power_of_two_moves_freely_between_query_key_and_scale(case: Case) -> None:
    given = problem(moderate(case))
    halved = with_scale(given, given.case.softmax_scale / 2)
    outputs = run(given).outputs

    for tensor in ("query", "key"):
        doubled = run(scaled(halved, tensor, 1)).outputs
        for one, other in zip(outputs, doubled, strict=True):
            if one.out.size:
                assert_same_bits(other, one, f"twice the {tensor} at half the scale and the plain call")
