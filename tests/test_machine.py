"""The life of a KVCache, rule by rule, on the kernels."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from properties import subjects
from properties.assertions import LawViolation
from properties.case import Case
from properties.checking import check
from properties.schedule import PlannedStep
from properties.strategies.machine import CacheMachine
from tests.command_line import BROKEN

BUDGET = settings(max_examples=12, stateful_step_count=4, deadline=None, derandomize=True, database=None)


class Checked:
    """Checks the whole history after each new step: numbers, lengths and every byte."""

    subject: str | None = None

    def __init__(self, world: Case) -> None:
        self.world = world

    def step(self, case: Case, planned: PlannedStep) -> None:
        assert planned.index == len(case.steps) - 1
        check(case, None if self.subject is None else subjects.load(self.subject))


class CheckedBroken(Checked):
    """The same with a kernel that counts keys beyond the last one."""

    subject = BROKEN


class KernelMachine(CacheMachine):
    make_executor = Checked


class BrokenMachine(CacheMachine):
    make_executor = CheckedBroken


def test_a_cache_lives_as_the_references_say() -> None:
    run_state_machine_as_test(KernelMachine, settings=BUDGET)


def test_the_machine_sees_a_broken_kernel() -> None:
    with pytest.raises(LawViolation, match="budget"):
        run_state_machine_as_test(BrokenMachine, settings=BUDGET)
