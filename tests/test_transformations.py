"""Changed problems are what they say: the reference gives for them what mathematics says of the change."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from properties import subjects
from properties.assertions import Expected
from properties.case import Case, Row, Step
from properties.checking import expectations
from properties.runner import Run, StepRun
from properties.schedule import Problem, problem
from properties.transformations import (
    exact,
    histories,
    in_format,
    keys_of,
    negated,
    on_a_fresh_cache,
    query_heads,
    scaled,
    shuffled,
    with_duplicated_keys,
    with_fewer_cached,
    with_groups,
    with_halves,
    with_inert_key,
    with_key_offset,
    with_newest_token_edited,
    with_one_dominant_key,
    with_permuted_keys,
    with_scale,
)
from references.rounding import decode

RAGGED = Case(
    rows=(Row(5, (3,)), Row(0, (2,), 1), Row(9, (0,), 2)),
    num_kv_heads=2,
    group_size=3,
    head_dim=5,
    start="tuple",
    capacity=9,
    cache_max_len=20,
    values="normal",
)
PLAIN = replace(RAGGED, op="attention", rows=(Row(7, (3,)), Row(7, (3,), 1)), start="empty", capacity=0)
FORKING = replace(
    RAGGED,
    rows=(Row(3, (2, 1, 2, 1)), Row(4, (1, 2, 1, 1), 1)),
    steps=(Step(), Step(update_cache=False), Step(parent=0, rollback=1), Step()),
)
BOTH = pytest.mark.parametrize("case", [RAGGED, PLAIN], ids=["cache", "no cache"])


def right(given: Problem) -> list[Expected]:
    """What the references say of every call."""
    made = Run(given, subjects.load("properties.subjects.naive:attention_with_kv_cache"))
    made.steps = [StepRun(step) for step in given.steps]
    return [expected for expected in expectations(made) if expected is not None]


def assert_equal(given: Problem, other: Problem, *, out: float = 1.0, lse: float = 0.0) -> None:
    """The outputs of the second are ``out`` times those of the first, its log-sum-exps ``lse`` larger."""
    for one, two in zip(right(given), right(other), strict=True):
        np.testing.assert_allclose(two.out, out * one.out, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(two.lse, lse + one.lse, rtol=1e-9, atol=1e-12)


@BOTH
def test_permuted_keys_give_the_same(case: Case) -> None:
    given = problem(case)
    other = with_permuted_keys(given)

    assert_equal(given, other)
    assert not np.array_equal(keys_of(given, 0)[0], keys_of(other, 0)[0])


@BOTH
def test_duplicated_keys_add_ln_2(case: Case) -> None:
    assert_equal(problem(case), with_duplicated_keys(problem(case)), lse=math.log(2.0))


@BOTH
def test_scaled_and_negated_values(case: Case) -> None:
    assert_equal(problem(case), scaled(problem(case), "value", 3), out=8.0)
    assert_equal(problem(case), negated(problem(case), "value"), out=-1.0)


@BOTH
def test_a_factor_moves_from_the_scale_to_the_query(case: Case) -> None:
    given = problem(case)

    assert_equal(given, with_scale(scaled(given, "query", 1), case.softmax_scale / 2))


@BOTH
def test_a_key_offset_moves_every_lse(case: Case) -> None:
    low, high = (with_key_offset(problem(case), query=2.0, key=key) for key in (0.0, 3.0))

    assert_equal(low, high, lse=6.0 * case.softmax_scale)


@BOTH
def test_an_inert_key_changes_nothing(case: Case) -> None:
    given = with_key_offset(problem(replace(case, scale=1.0)), query=16.0, key=16.0)
    other = with_inert_key(given)

    assert_equal(given, other)
    assert keys_of(other, 0)[0].shape[1] == keys_of(given, 0)[0].shape[1] + 1


@BOTH
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_dominant_key_decides(case: Case, is_causal: bool) -> None:
    given, winners = with_one_dominant_key(problem(replace(case, is_causal=is_causal, seed=1)))
    [expected] = right(given)

    assert winners[0] is not None
    value = decode(keys_of(given, 0)[1], case.dtype)[:, winners[0]]
    np.testing.assert_allclose(expected.out[0, :, -1], np.repeat(value, 3, axis=0), rtol=1e-9)


def test_a_dominant_key_of_a_row_without_queries_is_one_of_its_keys() -> None:
    idle = Row(1, (0,))
    case = replace(RAGGED, rows=(Row(), idle), is_causal=True, seed=0)

    assert with_one_dominant_key(problem(case))[1] == [0, 0]


@BOTH
def test_permuted_groups_permute_outputs(case: Case) -> None:
    [plain] = right(problem(case))
    [moved] = right(with_groups(problem(case), [1, 0]))

    np.testing.assert_array_equal(moved.out, plain.out[:, query_heads(case, [1, 0])])
    assert query_heads(case, [1, 0]) == [3, 4, 5, 0, 1, 2]


def test_halves_are_the_whole() -> None:
    for seed in (0, 1):
        first, second = with_halves(problem(replace(PLAIN, seed=seed)))

        assert [half.steps[0].kv_lens for half in (first, second)] == ([(6, 6), (1, 1)], [(3, 3), (4, 4)])[seed]
        joined = np.concatenate([keys_of(first, 1)[0], keys_of(second, 1)[0]], axis=1)
        np.testing.assert_array_equal(joined, keys_of(problem(replace(PLAIN, seed=seed)), 1)[0])


@BOTH
def test_the_first_keys_are_dropped(case: Case) -> None:
    given = problem(case)
    np.testing.assert_array_equal(keys_of(with_fewer_cached(given, 2), 0)[0], keys_of(given, 0)[0][:, 2:])
    left = 2 if case.op == "attention" else 3
    assert keys_of(with_fewer_cached(given, 5), 0)[0].shape[1] == left


@BOTH
def test_only_the_newest_token_is_edited(case: Case) -> None:
    before, after = problem(case), with_newest_token_edited(problem(case))

    np.testing.assert_array_equal(keys_of(before, 0)[0][:, :-1], keys_of(after, 0)[0][:, :-1])
    assert not np.array_equal(keys_of(before, 0)[1][:, -1], keys_of(after, 0)[1][:, -1])


def test_another_format_holds_the_same_numbers() -> None:
    given = problem(replace(RAGGED, dtype="bfloat16"))

    assert_equal(given, in_format(given, "float32"))
    assert in_format(given, "float16").steps[0].query.dtype == np.uint16


def test_a_number_that_the_format_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a transformed number must be exact in bfloat16, got 1\.001"):
        exact(np.array([1.0, 1.001]), "bfloat16")


def test_every_call_on_a_fresh_cache_is_the_same_problem() -> None:
    given = problem(FORKING)
    whole = right(given)

    for s, expected in enumerate(whole):
        [alone] = right(on_a_fresh_cache(given, s))
        np.testing.assert_array_equal(alone.out, expected.out)
        np.testing.assert_array_equal(alone.lse, expected.lse)


def test_histories_know_forks_and_rollbacks() -> None:
    lengths = [past.seq_lens if past else None for past in histories(problem(FORKING))]

    assert lengths == [(3, 4), (5, 5), (2, 3), (4, 4)]


def test_shuffles_depend_on_the_salt_alone() -> None:
    assert sorted(shuffled(20, 1, 2)) == list(range(20))
    assert shuffled(20, 1, 2) == shuffled(20, 1, 2) != shuffled(20, 1, 3)
