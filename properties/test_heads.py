"""Which query head reads which key/value head."""

from __future__ import annotations

from hypothesis import given

from properties.assertions import Got, assert_close, assert_same_outputs
from properties.case import Case
from properties.checking import expected_outputs
from properties.needs import asks
from properties.runner import run
from properties.schedule import problem
from properties.strategies import cases
from properties.transformations import query_heads, shuffled, with_groups
from properties.variants import on_the_lattice, repeated_heads


@asks("declared arithmetic")
@given(case=cases(min_group=2, runs=2, families=("lattice",)))
def test_grouped_heads_equal_repeated_key_value_heads_on_the_lattice(case: Case) -> None:
    case = on_the_lattice(case)
    grouped, repeated = run(case).outputs, run(repeated_heads(case)).outputs

    assert_same_outputs(grouped, repeated, "grouped heads and repeated ones")


@given(case=cases(min_group=2, runs=2))
def test_grouped_heads_stay_close_to_repeated_key_value_heads(case: Case) -> None:
    """Tiles of another height may sum in another order: within both budgets."""
    grouped, repeated = expected_outputs(run(case)), expected_outputs(run(repeated_heads(case)))

    for (one, allowed), (other, also) in zip(grouped, repeated, strict=True):
        assert_close(one, other, (allowed, also), "grouped heads and repeated ones")


@asks("bits across batches")
@given(case=cases(min_kv_heads=2, runs=2))
def test_permuting_groups_permutes_outputs(case: Case) -> None:
    given, order = problem(case), shuffled(case.num_kv_heads, case.seed)
    still: list[Got] = run(given).outputs
    moved = run(with_groups(given, order)).outputs

    heads = query_heads(case, order)
    assert_same_outputs(moved, [got.heads(heads) for got in still], "permuted groups and plain ones")
