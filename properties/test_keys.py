"""What a set of keys means: its order does not, each key's share does."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import given

from properties.assertions import assert_close, assert_near, assert_same_bits, assert_same_numbers, assert_same_outputs
from properties.case import Case
from properties.checking import expected_outputs, split_starts
from properties.halves import merged, merged_budget
from properties.needs import asks
from properties.runner import run
from properties.schedule import problem
from properties.strategies import cases
from properties.transformations import (
    changed,
    with_duplicated_keys,
    with_fewer_cached,
    with_halves,
    with_inert_key,
    with_inert_keys,
    with_key_offset,
    with_newest_token_edited,
    with_permuted_keys,
)
from properties.variants import decoding, finite, not_causal, on_the_lattice, one_call, plain, with_values
from properties.visible import largest_logits


def assert_only_the_lse_moves(case: Case) -> None:
    given = problem(case)
    shift = 256.0 * (-1) ** case.seed
    level = [with_key_offset(given, query=2.0, key=offset) for offset in (0.0, shift)]
    pairs = zip(*(expected_outputs(run(each)) for each in level), strict=True)

    for (one, allowed), (other, also) in pairs:
        moves = 2.0 * shift * case.softmax_scale
        assert_close(one, other, (allowed, also), "level and shifted logits", lse_moves_by=moves)


@given(case=cases(max_steps=1, causal=(False,), runs=2))
def test_permuting_keys_stays_within_the_budget(case: Case) -> None:
    given = problem(not_causal(finite(one_call(case))))
    pairs = zip(expected_outputs(run(given)), expected_outputs(run(with_permuted_keys(given))), strict=True)

    for (one, allowed), (other, also) in pairs:
        assert_close(one, other, (allowed, also), "keys in order and permuted")


@asks("declared arithmetic")
@given(case=cases(max_steps=1, causal=(False,), families=("lattice",), runs=2))
def test_permuting_keys_changes_no_bit_on_the_lattice(case: Case) -> None:
    given = problem(not_causal(on_the_lattice(one_call(case))))

    assert_same_outputs(run(with_permuted_keys(given)).outputs, run(given).outputs, "keys permuted and in order")


@given(case=cases(max_steps=2, runs=2))
def test_a_constant_on_all_logits_moves_only_the_lse(case: Case) -> None:
    """Keys shifted along the query, by far more than exp takes: the output stays, the LSE moves by the shift."""
    assert_only_the_lse_moves(finite(case))


@given(case=cases(ops=("attention_with_kv_cache",), min_rows=1, several_splits=True, runs=2, overflow=False))
def test_a_constant_on_all_logits_moves_only_the_lse_over_several_splits(case: Case) -> None:
    """Also where no part of a row holds a logit near 0."""
    assert_only_the_lse_moves(decoding(finite(case)))


@asks("declared arithmetic")
@given(case=cases(max_steps=2, families=("lattice",), runs=2))
def test_a_constant_on_all_logits_changes_no_bit_of_the_output_on_the_lattice(case: Case) -> None:
    given = problem(on_the_lattice(case))
    shifted = changed(given, {"key": lambda key: key + 64.0})

    for one, other in zip(run(shifted).outputs, run(given).outputs, strict=True):
        assert_same_numbers("out", one, one.values, other.values, "shifted and level logits")


@asks("declared arithmetic", "lse")
@given(case=cases(max_steps=1, families=("lattice",), runs=2))
def test_duplicating_every_key_adds_ln_2_to_the_lse(case: Case) -> None:
    """On the lattice the output keeps its bits."""
    given = problem(not_causal(on_the_lattice(one_call(case))))
    twice, once = expected_outputs(run(with_duplicated_keys(given))), expected_outputs(run(given))

    for (one, allowed), (other, also) in zip(once, twice, strict=True):
        assert_same_numbers("out", one, one.values, other.values, "keys once and twice")
        assert_close(one, other, (allowed, also), "keys once and twice", lse_moves_by=math.log(2.0))


@asks("declared arithmetic")
@given(case=cases(max_steps=1, runs=2))
def test_a_key_far_below_the_maximum_changes_no_bit(case: Case) -> None:
    """More than 150 octaves: its weight is zero in float32. It may open a tile of its own.

    It may not open a split or move the start of one: then other keys are summed together.
    """
    given = problem(with_values(one_call(case) if case.op != "attention" else not_causal(case), "normal", scale=1.0))
    given = with_key_offset(given, query=16.0, key=16.0)

    more = with_inert_key(given)
    starts = zip(split_starts(more), split_starts(given), strict=True)
    alike = [b for b, (one, other) in enumerate(starts) if one == other]

    for one, other in zip(run(more).outputs, run(given).outputs, strict=True):
        if alike and one.out.size:
            assert_same_bits(one.rows(alike), other.rows(alike), "an inert key more and without")


@asks("declared arithmetic")
@given(case=cases(max_steps=1, min_rows=1, runs=2))
def test_values_of_keys_far_below_the_maximum_do_not_matter(case: Case) -> None:
    """However large they are, and though they come first: a weight of zero is zero after every later maximum."""
    given = problem(with_values(not_causal(one_call(case)), "normal", scale=1.0))
    given = with_key_offset(given, query=16.0, key=16.0)
    huge = 2.0**8 if case.dtype == "float16" else 2.0**112  # thousands of them have a finite sum

    small, large = (run(with_inert_keys(given, number)).outputs for number in (1.0, huge))
    assert_same_outputs(large, small, "huge values of weight zero and small ones")


@asks("bits across runs")
@given(case=cases(max_steps=2, causal=(True,), runs=2))
def test_editing_the_newest_token_leaves_earlier_queries(case: Case) -> None:
    given = problem(replace(finite(one_call(case)), is_causal=True))
    edited, unedited = run(with_newest_token_edited(given)).outputs, run(given).outputs

    for one, other in zip(edited, unedited, strict=True):
        for b, new in enumerate(given.steps[0].new_lens):
            if new > 1:
                before, after = (got.rows(b).queries(slice(new - 1)) for got in (other, one))
                assert_same_bits(before, after, "queries before a plain token and an edited one")


@asks("lse")
@given(case=cases(max_steps=1, runs=2))
def test_lse_is_monotone_in_the_visible_set(case: Case) -> None:
    given = problem(finite(one_call(case)))
    fewer = with_fewer_cached(given, 1 + case.seed % 20)
    pairs = zip(expected_outputs(run(given)), expected_outputs(run(fewer)), strict=True)

    for (all_of, allowed), (some, also) in pairs:
        lowest = np.minimum(all_of.lse_values, some.lse_values)
        budget = allowed.lse_budget + also.lse_budget
        comparable = allowed.overflow_free & also.overflow_free
        assert_near("lse", some, lowest, some.lse_values, budget, comparable, "all keys and some of them")


@asks("lse")
@given(case=cases(max_steps=2))
def test_lse_lies_between_the_largest_logit_and_ln_n_above_it(case: Case) -> None:
    made = run(finite(case))

    for step, (got, allowed) in zip((s for s in made.steps if s.got), expected_outputs(made), strict=True):
        nearest = np.clip(got.lse_values, *largest_logits(made, step))
        comparable = allowed.overflow_free
        assert_near("lse", got, got.lse_values, nearest, allowed.lse_budget, comparable, "an LSE and its limits")


@asks("lse")
@given(case=cases(max_steps=1, ops=("attention",), causal=(False,), runs=3))
def test_two_halves_merged_by_their_lse_equal_the_whole(case: Case) -> None:
    given = problem(not_causal(finite(plain(case))))
    whole, *halves = (expected_outputs(run(each)) for each in (given, *with_halves(given)))

    for (got, allowed), (one, one_allowed), (other, other_allowed) in zip(whole, *halves, strict=True):
        out, lse = merged(one, other)
        out_budget, lse_budget = merged_budget((one, one_allowed), (other, other_allowed), allowed)
        comparable = allowed.overflow_free & one_allowed.overflow_free & other_allowed.overflow_free
        assert_near("out", got, got.values, out, out_budget, comparable[..., None], "the whole and merged halves")
        assert_near("lse", got, got.lse_values, lse, lse_budget, comparable, "the whole and merged halves")
