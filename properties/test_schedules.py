"""How the same tokens came into the cache does not matter: in one call or many, after forks, retries and roll-backs."""

from __future__ import annotations

from hypothesis import given

from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.needs import asks
from properties.runner import run
from properties.schedule import problem
from properties.sequences import assert_close_sequences, assert_same_caches, assert_same_sequences
from properties.strategies import cases
from properties.transformations import on_a_fresh_cache
from properties.variants import appends, as_single_prefill, as_single_tokens, on_the_lattice, roomy, with_cache

WITH_CACHE = ("attention_with_kv_cache",)


@given(case=cases(ops=WITH_CACHE, min_steps=2, runs=3, overflow=False))
def test_any_partition_into_steps_gives_the_same_outputs(case: Case) -> None:
    steps = run(appends(case))

    assert_close_sequences(steps, run(as_single_prefill(case)), "several calls and one prefill")
    assert_close_sequences(steps, run(as_single_tokens(case)), "several calls and single tokens")


@asks("cache", "declared arithmetic")
@given(case=cases(ops=WITH_CACHE, min_steps=2, families=("lattice",), runs=3, overflow=False))
def test_any_partition_into_steps_gives_the_same_bits_on_the_lattice(case: Case) -> None:
    case = on_the_lattice(case)
    steps = run(appends(case))

    assert_same_sequences(steps, run(as_single_prefill(case)), "several calls and one prefill")
    assert_same_sequences(steps, run(as_single_tokens(case)), "several calls and single tokens")


@asks("cache")
@given(case=cases(ops=WITH_CACHE, min_steps=2, runs=3, overflow=False))
def test_any_partition_into_steps_fills_the_cache_alike(case: Case) -> None:
    steps, whole = run(appends(case)), run(as_single_prefill(case))

    assert_same_caches(steps, whole)


@asks("cache", "bits across batches")
@given(case=cases(ops=WITH_CACHE, min_steps=2, runs=3, overflow=False))
def test_a_call_on_a_used_cache_equals_one_on_a_fresh_cache(case: Case) -> None:
    """Forks, retries, roll-backs and growth leave a cache that is worth its own tokens and nothing else."""
    used = problem(roomy(with_cache(case)))
    outputs = run(used).outputs

    for s, got in enumerate(outputs):
        fresh = run(on_a_fresh_cache(used, s)).outputs
        assert_same_outputs([got], fresh, f"call {s + 1} on the cache it got and on a fresh one")
