"""What can be put under test, and what the suite knows about flashcore's tiles."""

from __future__ import annotations

import pytest

from flashcore.fast import tuning
from properties import subjects
from properties.case import Case, Row
from properties.guards import torch_dtype
from properties.subjects import Subject, SubjectError, naive


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("os", "must be flashcore or package.module:function, got 'os'"),
        ("os:", "must be flashcore or package.module:function"),
        ("a b:c", "must be flashcore or package.module:function"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("properties.case:no_such", "and properties.case has no no_such"),
        ("properties.case:LAYOUTS", "must name a function"),
    ],
)
def test_a_specification_that_names_no_function_is_refused_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(SubjectError) as refused:
        subjects.load(spec)

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_module_offers_beside_its_function_is_used() -> None:
    found = subjects.load("properties.subjects.naive:attention_with_kv_cache")

    assert found.make_cache is naive.KVCache
    assert found.overflow_error is naive.CacheOverflowError
    assert found.allocators == (naive,)
    assert found.attention is naive.attention


@pytest.fixture
def flashcore() -> Subject:
    return subjects.load("flashcore")


@pytest.mark.parametrize("q_len", [1, 5, 200])
@pytest.mark.parametrize("cached", [0, 15, 16, 300, 1000])
def test_flashcore_visits_every_key_once_in_as_many_splits_as_it_plans(
    q_len: int, cached: int, flashcore: Subject
) -> None:
    case = Case(rows=(Row(cached, (q_len,)),), start="tuple", capacity=1200, block_n=32, kv_split_size=64)
    with flashcore.forced(case):
        splits = flashcore.tiles(case, q_len, cached, q_len)
        plan = tuning.plan(q_len=q_len, group_size=1, head_dim=case.head_dim, dtype=torch_dtype(case.dtype), block_n=32)

    assert [key for split in splits for tile in split for key in range(*tile)] == list(range(cached + q_len))
    assert len(splits) == plan.num_splits(cached)
    if plan.path == "split":
        assert splits[-1][-1] == (cached, cached + q_len)


def test_a_causal_call_without_a_cache_ends_in_the_diagonal(flashcore: Subject) -> None:
    case = Case(rows=(Row(50, (3,)),), op="attention", is_causal=True, block_n=16)

    assert flashcore.tiles(case, 3, 50, 0)[-1][-1] == (47, 50)
