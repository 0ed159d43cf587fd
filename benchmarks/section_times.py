"""Where the time of a verification goes: a stopwatch of nested sections, put around the suite's own functions."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECTIONS = ("drawing", "data", "kernel", "oracle", "comparison", "rest")
"""Of one case: choosing it (Hypothesis); making its arrays; the calls under test; references and error budgets;
comparing numbers and bytes; everything else, such as guarded buffers and snapshots."""


class Stopwatch:
    """Seconds by section, each second counted once, for the innermost section.

    Args:
        base: the section that runs while no other does.
        now: a monotonic clock, for tests.
    """

    def __init__(self, base: str, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._open = [base]
        self._since = now()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what happens inside for this section."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted for a section."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.section(name):
                return function(*arguments, **options)

        return timed

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        self._switch()
        return dict(self.seconds)

    def _switch(self) -> None:
        now = self._now()
        name = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def watched_functions() -> dict[str, list[Any]]:
    """The suite's functions by the section they make up."""
    from properties import answers, assertions, checking, schedule

    compare = [value for name, value in vars(assertions).items() if name.startswith("assert_")]
    return {
        "data": [schedule.planned_step, schedule.initial_cache],
        "oracle": [answers.results, answers.attended, checking._with_budgets],
        "comparison": [*compare, checking.assert_no_findings],
    }


@contextmanager
def watching(stopwatch: Stopwatch) -> Iterator[None]:
    """Time the suite's functions wherever one of its modules has them, and the calls of the active subject."""
    from properties import runner, subjects

    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, section: str) -> None:
        original = getattr(owner, name)
        undo.append((owner, name, original))
        setattr(owner, name, stopwatch.around(section, original))

    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "properties"]
    for section, functions in watched_functions().items():
        for function in functions:
            for module in modules:
                for name in [name for name, value in vars(module).items() if value is function]:
                    replace(module, name, section)
    replace(runner._Session, "_compare_bytes", "comparison")
    subject = subjects.active()
    timed = dataclasses.replace(
        subject,
        attention_with_kv_cache=_finished(stopwatch, subject.attention_with_kv_cache),
        attention=None if subject.attention is None else _finished(stopwatch, subject.attention),
    )
    spec = subject.spec
    subjects._loaded[spec] = timed
    try:
        yield
    finally:
        subjects._loaded[spec] = subject
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)


def _finished(stopwatch: Stopwatch, call: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel call, counted until the device is done."""
    import torch

    from properties import device

    def run(*arguments: Any, **options: Any) -> Any:
        result = call(*arguments, **options)
        if device.current() == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return result

    return stopwatch.around("kernel", run)
