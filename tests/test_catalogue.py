"""Every law can be asked of every case: replay, reduction and the search for sibling laws do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from properties import laws, needs, subjects
from properties.case import Case, Patch, Row, Step
from references.lattice import lattice_scale

LAWS = laws.discover()
RAGGED = Case(
    rows=(Row(3, (2, 1)), Row(0, (1, 0), 1)),
    steps=(Step(padding=1), Step(update_cache=False)),
    num_kv_heads=2,
    group_size=2,
    head_dim=5,
    start="tuple",
    capacity=5,
    cache_max_len=5,
)
CASES = {
    "the default": Case(cache_max_len=1),
    "no rows": Case(rows=()),
    "no query": Case(rows=(Row(0, (0,)),), cache_max_len=1),
    "no cache, no key": Case(rows=(Row(0, (2,)),), op="attention"),
    "no cache, no query": Case(rows=(Row(3, (0,)),), op="attention"),
    "no cache, fewer keys than queries": Case(rows=(Row(1, (3,)),) * 2, op="attention", is_causal=True, values="ones"),
    "overflow": replace(RAGGED, cache_max_len=4, scale=0.0, values="rising"),
    "fork and not finite": replace(
        RAGGED,
        steps=(Step(), Step(parent=0, rollback=2)),
        start="kv_cache",
        values="normal",
        patches=(Patch("value", 0, 1, 1, 2, "nan"),),
    ),
    "expanded heads, overflow of the numbers": replace(
        RAGGED, key_layout="expanded_heads", kv_head_copies=2, values="large_values", dtype="bfloat16"
    ),
    "lattice": replace(RAGGED, head_dim=1, values="lattice", scale=lattice_scale(2), dtype="float16", seed=7),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_law_holds_on_every_kind_of_case(case: Case) -> None:
    broken = {}
    for name, law in LAWS.items():
        try:
            law.check(case)
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"

    assert broken == {}


def test_every_law_is_a_sentence() -> None:
    assert len(LAWS) >= 50
    short = ["the_scale_matters", "is_causal_matters", "new_lens_matter", "seq_lens_matter"]
    assert [name for name in LAWS if len(name.split("_")) < 4] == short


def test_only_declared_needs_excuse_a_law() -> None:
    unknown, known = subjects.load("properties.subjects.naive:attention_with_kv_cache"), subjects.load("flashcore")
    owed, not_offered = laws.owed(LAWS, lambda need: unknown.meets(need, "cpu"))

    declared = {"declared arithmetic", "checked arguments", "device checks"}
    assert set(not_offered) == {name for name, law in LAWS.items() if law.asks & declared}
    assert set(not_offered.values()) == declared
    assert {*owed, *not_offered} == set(LAWS)
    assert laws.owed(LAWS, lambda need: known.meets(need, "cpu")) == (LAWS, {})


def test_a_need_that_does_not_exist_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match=r"a law must ask for one of declared arithmetic, .*, got exact bits"):
        needs.asks("exact bits")  # type: ignore[arg-type]
