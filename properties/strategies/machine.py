"""The life of a KVCache as a Hypothesis state machine whose history is a case.

Each rule adds one step to the case and executes it at once, so that what a rule may do can depend on what has
become of the cache, and a failure is stored, replayed and reduced like that of any other case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from properties.case import DTYPES, FAMILIES, MAX_STEPS, Case, Row, Step
from properties.schedule import PlannedStep, outline, planned_step
from properties.strategies.cases import numbers
from properties.strategies.choices import choose
from properties.strategies.sizes import chosen_size


class Executor(Protocol):
    """Runs a case step by step and checks each step; raises on the first that is wrong."""

    def step(self, case: Case, planned: PlannedStep) -> None:
        """Run the newest step of `case`, the caches of the earlier ones being kept."""


@st.composite
def _worlds(draw: st.DrawFn) -> Case:
    """A case before its first step: everything but the schedule. Its one step is a placeholder."""
    limits = chosen_size()
    batch = choose(draw, "machine batch", (1, 2, 3))
    uids = [choose(draw, f"machine uids[{b}]", tuple(range(8))) for b in range(batch)]
    cached = [choose(draw, f"machine cached[{b}]", (0, 1, 15, 16, 17, 33)) for b in range(batch)]
    start = choose(draw, "machine start", ("empty", "kv_cache", "tuple"))
    spare = choose(draw, "machine spare", (0, 1, 16))
    room = choose(draw, "machine room", (64, 20, 40))
    if start == "empty":
        cached = [0] * batch
    longest = max(1, *cached)
    fields: dict[str, Any] = {"start": start, "dtype": choose(draw, "machine dtype", DTYPES)}
    return Case(
        rows=tuple(Row(n, (1,), uid) for n, uid in zip(cached, uids, strict=True)),
        num_kv_heads=choose(draw, "machine kv heads", (1, 2, 3)),
        group_size=choose(draw, "machine groups", (1, 2, 3)),
        head_dim=choose(draw, "machine head_dim", (16, 32, 80)),
        is_causal=choose(draw, "machine causal", (False, True)),
        capacity=longest + spare if start != "empty" else 0,
        cache_max_len=longest + room,
        block_n=choose(draw, "machine block_n", (None, *limits.tiles)),
        **fields,
        **numbers(draw, FAMILIES),
    )


class CacheMachine(RuleBasedStateMachine):
    """Prefill, decode, chunk, peek, fork, roll back, grow, overflow, in any order.

    Subclass it and set `make_executor`; `case` is the history so far, `None` before the first step.
    """

    make_executor: Callable[[Case], Executor]

    def __init__(self) -> None:
        """Start without a cache."""
        super().__init__()
        self.world = Case()
        self.case: Case | None = None
        self.executor: Executor | None = None

    @initialize(world=_worlds())
    def open(self, world: Case) -> None:
        """Choose everything but the schedule."""
        self.world = world
        self.executor = type(self).make_executor(world)

    def can_go_on(self) -> bool:
        """Whether a case may have another step."""
        return self.case is None or len(self.case.steps) < MAX_STEPS

    def can_go_back(self) -> bool:
        """Whether there is an older cache to fork from."""
        return self.can_go_on() and self.case is not None and len(self._lineage()) > 1

    @precondition(can_go_on)
    @rule(padding=st.sampled_from((0, 1)))
    def decode(self, padding: int) -> None:
        """One token for every row."""
        self._step(Step(padding=padding), [1] * self.world.batch)

    @precondition(can_go_on)
    @rule(counts=st.lists(st.sampled_from((1, 0, 2, 3, 15, 16, 17)), min_size=3, max_size=3))
    def append(self, counts: list[int]) -> None:
        """A prompt or a chunk, other lengths in other rows."""
        self._step(Step(), counts[: self.world.batch])

    @precondition(can_go_on)
    @rule(count=st.sampled_from((1, 2, 17)))
    def peek(self, count: int) -> None:
        """Attend without storing."""
        self._step(Step(update_cache=False), [count] * self.world.batch)

    @precondition(can_go_back)
    @rule(age=st.integers(1, 4), count=st.sampled_from((1, 2, 17)))
    def fork(self, age: int, count: int) -> None:
        """Go on from an older cache."""
        line = self._lineage()
        self._step(Step(parent=line[max(0, len(line) - 1 - age)]), [count] * self.world.batch)

    @precondition(can_go_on)
    @rule(dropped=st.sampled_from((1, 2, 16, 17)), count=st.sampled_from((1, 2)))
    def roll_back(self, dropped: int, count: int) -> None:
        """Take tokens back, then bring others."""
        self._step(Step(rollback=dropped), [count] * self.world.batch)

    @precondition(can_go_on)
    @rule(row=st.integers(0, 2), beyond=st.sampled_from((1, 0, 2)))
    def fill(self, row: int, beyond: int) -> None:
        """Bring one row exactly to the limit, or past it: then nothing may be stored."""
        row %= self.world.batch
        room = self.world.cache_max_len - self._lengths()[row]
        self._step(Step(), [room + beyond if b == row else 1 for b in range(self.world.batch)])

    def _step(self, step: Step, new: list[int]) -> None:
        """Add a step to the history and execute it."""
        case = self.world if self.case is None else self.case
        rows = tuple(
            replace(row, new=(*(row.new if self.case is not None else ()), count))
            for row, count in zip(case.rows, new, strict=True)
        )
        steps = (*(case.steps if self.case is not None else ()), step)
        self.case = replace(case, rows=rows, steps=steps)
        assert self.executor is not None
        self.executor.step(self.case, planned_step(self.case, outline(self.case)[-1]))

    def _lineage(self) -> tuple[int, ...]:
        """Caches a next step may continue from, the newest last."""
        if self.case is None:
            return (0,)
        return self.case.lineage(len(self.case.steps))[:-1]

    def _lengths(self) -> tuple[int, ...]:
        """Slots valid in each row of the newest cache."""
        if self.case is None:
            return tuple(row.cached for row in self.world.rows)
        probe: dict[str, Any] = {
            "rows": tuple(replace(row, new=(*row.new, 0)) for row in self.case.rows),
            "steps": (*self.case.steps, Step()),
        }
        return outline(replace(self.case, **probe))[-1].seq_lens
