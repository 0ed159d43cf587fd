"""A row's result is its own: neighbours, their order and spare slots change no bit of it."""

from __future__ import annotations

from hypothesis import given

from properties import subjects
from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.transformations import shuffled
from properties.variants import alone, beside_grown_splits, permuted, roomy, with_an_idle_row, with_capacity

WITH_CACHE = ("attention_with_kv_cache",)


@asks("bits across batches")
@given(case=cases(min_rows=2, runs=2, overflow=False))
def test_a_row_alone_equals_the_row_in_its_batch(case: Case) -> None:
    case = roomy(case)
    together = run(case).outputs

    for b in range(case.batch):
        single = run(alone(case, b)).outputs
        assert_same_outputs([got.rows(b) for got in together], single, f"row {b} in its batch and alone")


@asks("bits across batches", "tiles")
@given(case=cases(ops=WITH_CACHE, min_rows=2, max_steps=3, many_splits=True, runs=2, overflow=False))
def test_a_row_of_many_splits_alone_equals_the_row_in_its_batch(case: Case) -> None:
    """However the splits of many rows and of one are shared out, they are merged alike."""
    case = roomy(case)
    together = run(case).outputs

    for b in range(case.batch):
        single = run(alone(case, b)).outputs
        assert_same_outputs([got.rows(b) for got in together], single, f"row {b} in its batch and alone")


@asks("bits across batches")
@given(case=cases(min_rows=2, runs=2, overflow=False))
def test_a_row_equals_itself_beside_an_empty_one(case: Case) -> None:
    case = roomy(case)
    beside, before = run(with_an_idle_row(case)).outputs, run(case).outputs
    others = [b for b in range(case.batch) if b != case.seed % case.batch or case.op == "attention"]

    kept, old = ([got.rows(others) for got in outputs] for outputs in (beside, before))
    assert_same_outputs(kept, old, "rows beside an empty row and beside its former self")


@asks("bits across batches")
@given(case=cases(min_rows=2, runs=2, overflow=False))
def test_permuting_rows_permutes_results(case: Case) -> None:
    case, order = roomy(case), shuffled(case.batch, case.seed)
    moved, still = run(permuted(case, order)).outputs, run(case).outputs

    assert_same_outputs(moved, [got.rows(order) for got in still], "the permuted and the plain batch")


@asks("cache", "bits across batches")
@given(case=cases(ops=WITH_CACHE, runs=2, overflow=False))
def test_spare_capacity_changes_nothing(case: Case) -> None:
    case = roomy(case)
    spacious = with_capacity(case, max(case.capacity, case.cache_max_len) + 1 + case.seed)

    assert_same_outputs(run(spacious).outputs, run(case).outputs, "a cache with room to spare and without")


@asks("bits across batches", "tiles")
@given(
    case=cases(ops=("attention_with_kv_cache",), min_rows=2, min_steps=3, several_splits=True, runs=8, overflow=False)
)
def test_a_row_alone_equals_itself_beside_longer_rows_of_fewer_splits(case: Case) -> None:
    """Splits that may not become more grow, so a longer row may have fewer of them."""
    case = beside_grown_splits(case)
    for name, forced in subjects.active().paths.items():
        subject = subjects.forced_to(subjects.active(), forced)
        together = run(case, subject).outputs
        for b in range(min(case.batch, 2)):
            single = run(alone(case, b), subject).outputs
            assert_same_outputs([got.rows(b) for got in together], single, f"{name}: row {b} in its batch and alone")
