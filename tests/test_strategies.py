"""Drawn cases are valid, reach every region that matters, and shrink to what a person would write."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis.stateful import run_state_machine_as_test

from properties.case import Case, Row, Step
from properties.reduction import reduce, simplifications, size
from properties.schedule import PlannedStep, outline
from properties.strategies import REGIONS, cases, describe
from properties.strategies.machine import CacheMachine
from tests.schedule_oracle import follow

COUNTED = settings(max_examples=2000, database=None, deadline=None, derandomize=True)


def test_every_region_is_reached_by_one_case_in_200() -> None:
    reached: Counter[str] = Counter()
    drawn = []

    @COUNTED
    @given(cases(size="small"))
    def count(case: Case) -> None:
        drawn.append(case)
        reached.update(describe(case))

    count()

    assert len(drawn) == 2000
    assert reached.keys() <= set(REGIONS)
    assert {region: reached[region] for region in REGIONS if reached[region] * 200 < len(drawn)} == {}


def test_drawn_cases_differ() -> None:
    """Examples that only repeat each other's dimensions would look like many and test few."""
    drawn: set[tuple[object, ...]] = set()

    @settings(COUNTED, max_examples=500)
    @given(cases(size="small"))
    def collect(case: Case) -> None:
        drawn.add((case.rows, case.num_q_heads, case.head_dim, case.dtype, case.values))

    collect()

    assert len(drawn) > 400


@settings(COUNTED, max_examples=150)
@given(cases(size="small", ops=("attention_with_kv_cache",)))
def test_oracle_agrees_with_every_drawn_schedule(case: Case) -> None:
    follow(case)


@settings(COUNTED, max_examples=200)
@given(cases(size="small"))
def test_drawn_case_survives_json_and_repr(case: Case) -> None:
    assert Case.from_json(case.to_json()) == case
    assert eval(repr(case)) == case


@settings(COUNTED, max_examples=200)
@given(cases(size="small", overflow=False))
def test_overflow_can_be_left_out(case: Case) -> None:
    assert all(call.overflow_row is None for call in outline(case))


@settings(COUNTED, max_examples=200)
@given(cases(size="small", non_finite=True, max_steps=2, dtypes=("float16",), ops=("attention_with_kv_cache",)))
def test_options_narrow_what_is_drawn(case: Case) -> None:
    assert bool(case.patches) is bool(case.rows)
    assert len(case.steps) <= 2
    assert case.dtype == "float16"
    assert case.op == "attention_with_kv_cache"


def test_large_cases_are_large() -> None:
    drawn: list[Case] = []

    @settings(COUNTED, max_examples=300)
    @given(cases(size="large"))
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()

    assert max(case.batch for case in drawn) > 24
    assert max(row.cached for case in drawn for row in case.rows) >= 2048


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="FLASHCORE_CASE_SIZE must be one of small, large, got 'huge'"):
        find(cases(size="huge"), lambda _: True)


def overflows_later(case: Case) -> bool:
    return any(call.overflow_row not in (None, 0) for call in outline(case))


# What is wrong, and the case a person would write for it.
MINIMAL: dict[str, tuple[Callable[[Case], bool], Case]] = {
    "a key past a full tile": (
        lambda case: any(n > 16 and n % 16 == 1 for call in outline(case) for n in call.kv_lens),
        Case(rows=(Row(cached=16),), start="tuple", capacity=17, cache_max_len=17),
    ),
    "several kv heads with groups": (
        lambda case: case.batch > 0 and case.num_kv_heads > 1 and case.group_size > 1,
        Case(num_kv_heads=2, group_size=2, cache_max_len=1),
    ),
    "overflow of a row after a good one": (
        overflows_later,
        Case(rows=(Row(), Row(cached=1)), start="tuple", capacity=2, cache_max_len=1),
    ),
    "an empty row beside a full one": (
        lambda case: "empty row beside a full one" in describe(case),
        Case(rows=(Row(), Row(new=(0,))), cache_max_len=1),
    ),
    "three splits": (
        lambda case: "3 or more splits" in describe(case),
        Case(rows=(Row(cached=33),), start="tuple", capacity=34, cache_max_len=34, block_n=16, kv_split_size=16),
    ),
    "a fork": (
        lambda case: case.batch > 0 and "fork" in describe(case),
        Case(rows=(Row(new=(1, 1)),), steps=(Step(), Step(parent=0)), cache_max_len=1),
    ),
    "growth": (
        lambda case: "growth" in describe(case),
        Case(rows=(Row(cached=1),), start="tuple", capacity=1, cache_max_len=2),
    ),
    "a padded head_dim": (
        lambda case: case.batch > 0 and "head_dim padded" in describe(case),
        Case(head_dim=80, cache_max_len=1),
    ),
    "one family in one dtype": (
        lambda case: case.batch > 0 and case.dtype == "bfloat16" and case.values == "normal",
        Case(dtype="bfloat16", cache_max_len=1, values="normal"),
    ),
}


@pytest.mark.parametrize("name", MINIMAL)
@pytest.mark.parametrize("seed", [0, 1])
def test_failure_shrinks_to_the_case_a_person_would_write(name: str, seed: int) -> None:
    fails, expected = MINIMAL[name]
    shrunk = find(
        cases(size="small"),
        fails,
        settings=settings(max_examples=2000, database=None, deadline=None),
        random=random.Random(seed),
    )

    assert reduce(shrunk, fails, time.monotonic() + 60) == expected


@settings(COUNTED, max_examples=50)
@given(cases(size="small"))
def test_simplifications_are_simpler(case: Case) -> None:
    assert all(size(simpler) < size(case) for simpler in simplifications(case))


def test_reduction_stops_at_its_deadline() -> None:
    case = Case(num_kv_heads=2, group_size=2, cache_max_len=1)

    assert reduce(case, lambda _: True, time.monotonic() - 1) == case
    assert reduce(case, lambda _: True, time.monotonic() + 60) == Case(cache_max_len=1)


class Ledger:
    """An executor that only keeps books: each step must go on where the last one left off."""

    seen: ClassVar[Counter[str]] = Counter()
    histories: ClassVar[list[Case]] = []
    broken_after: ClassVar[int | None] = None

    def __init__(self, _: Case) -> None:
        self.steps = 0

    def step(self, case: Case, planned: PlannedStep) -> None:
        self.steps += 1
        assert len(case.steps) == self.steps == planned.index + 1
        self.seen.update(describe(case))
        self.histories.append(case)
        assert self.broken_after is None or planned.kv_lens[0] <= self.broken_after


class LedgerMachine(CacheMachine):
    make_executor = Ledger


MACHINE = settings(
    max_examples=60,
    stateful_step_count=6,
    phases=(Phase.generate, Phase.shrink),
    database=None,
    deadline=None,
    derandomize=True,
)


def test_machine_lives_every_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "seen", Counter())
    run_state_machine_as_test(LedgerMachine, settings=MACHINE)

    kinds = {"decode", "chunked prefill", "multi-token decode", "peek", "fork", "rollback", "growth", "overflow"}
    assert kinds <= Ledger.seen.keys()


def test_failure_of_the_machine_is_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that loses count past 20 keys: the last history recorded is the minimal one, and it is a case."""
    monkeypatch.setattr(Ledger, "histories", [])
    monkeypatch.setattr(Ledger, "broken_after", 20)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(LedgerMachine, settings=MACHINE)

    last = Ledger.histories[-1]
    assert outline(last)[-1].kv_lens[0] > 20
    assert len(last.steps) <= 2
    follow(last)
