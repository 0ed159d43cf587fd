"""A kernel computes what the references compute, and touches nothing else."""

from __future__ import annotations

from hypothesis import given

from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings, check_run, check_values
from properties.needs import asks
from properties.runner import run
from properties.strategies import aim, cases
from properties.variants import across_a_split, decoding, on_a_diagonal, ragged_stream, steady

WITH_CACHE = ("attention_with_kv_cache",)


@given(case=cases())
def test_output_and_lse_lie_within_the_error_budget_at_every_step(case: Case) -> None:
    used = check_values(run(case))

    aim(out=used.out, lse=used.lse)


@asks("NaN in unread memory")
@given(case=cases())
def test_nothing_invisible_is_read(case: Case) -> None:
    """NaN in unused slots, padding, gaps and fresh memory changes no bit of any result."""
    poisoned, clean = run(case).outputs, run(case, poisoned=False).outputs

    assert_same_outputs(poisoned, clean, "the poisoned and the clean run")


@given(case=cases())
def test_nothing_else_is_written(case: Case) -> None:
    """Inputs, lengths, guards, gaps and every slot but the new ones keep their bytes."""
    made = run(case)

    assert_no_findings(made, ["inputs", "cache", "guard"])


@asks("cache")
@given(case=cases())
def test_append_stores_bit_exact_copies(case: Case) -> None:
    """The returned cache holds the old tokens, then the new ones, and says how many."""
    made = run(case)

    assert_no_findings(made, ["append", "lengths"])


@asks("overflow")
@given(case=cases())
def test_overflow_is_all_or_nothing(case: Case) -> None:
    """A call raises exactly when a row passes cache_max_len, and then no byte has changed."""
    made = run(case)

    assert_no_findings(made, ["overflow", "raised", "cache", "inputs"])


@given(case=cases(ops=("attention",)))
def test_attention_without_a_cache_lies_within_the_error_budget(case: Case) -> None:
    """More queries than keys, fewer, as many: aligned to the last key when causal."""
    used = check_values(run(case))

    aim(out=used.out, lse=used.lse)


@given(case=cases(ops=("attention",), min_rows=1, runs=2))
def test_a_diagonal_anywhere_in_a_tile_lies_within_the_error_budget(case: Case) -> None:
    used = check_values(run(on_a_diagonal(case)))

    aim(out=used.out, lse=used.lse)


@given(case=cases(ops=WITH_CACHE, min_rows=1, several_splits=True, overflow=False))
def test_decode_over_several_splits_lies_within_the_error_budget(case: Case) -> None:
    """What a server does all day: one token a row, unequal numbers of splits; and no write beyond the scratch."""
    made = run(decoding(case))
    used = check_values(made)
    assert_no_findings(made, ["guard"])

    aim(out=used.out, lse=used.lse)


@given(case=cases(ops=WITH_CACHE, min_rows=1, max_steps=1, long_rows=True, overflow=False))
def test_decode_of_rows_long_enough_to_be_split_lies_within_the_error_budget(case: Case) -> None:
    """In as many splits as the kernel likes, on its own account."""
    made = run(decoding(case))
    used = check_values(made)
    assert_no_findings(made, ["guard"])

    aim(out=used.out, lse=used.lse)


@asks("cache in place")
@given(case=cases(ops=WITH_CACHE, min_rows=1, min_steps=4, several_splits=True, overflow=False))
def test_a_steady_stream_of_calls_is_right_to_the_byte(case: Case) -> None:
    """Calls that a kernel may prepare once and repeat, across the edges of tiles and splits."""
    case = steady(case)

    check_run(run(across_a_split(case) if case.seed % 2 else case))


@asks("cache in place")
@given(case=cases(ops=WITH_CACHE, min_rows=1, min_steps=3, many_splits=True, overflow=False))
def test_a_stream_over_many_splits_is_right_to_the_byte(case: Case) -> None:
    """Splits become more from call to call, and with them what a program takes of them."""
    case = steady(case)

    check_run(run(across_a_split(case) if case.seed % 2 else case))


@asks("cache in place")
@given(case=cases(ops=WITH_CACHE, min_rows=2, min_steps=4, several_splits=True, runs=2, overflow=False))
def test_a_ragged_stream_of_calls_is_right_to_the_byte(case: Case) -> None:
    """Calls of which none is like the one before: no bound, counter or scratch of a smaller one is enough."""
    check_run(run(ragged_stream(case)))
