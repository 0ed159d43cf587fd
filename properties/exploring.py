"""Look for a case that breaks a law, within a time limit, and make it small."""

from __future__ import annotations

import functools
import os
import time
import traceback
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase
from hypothesis.errors import HypothesisException

from properties import reduction
from properties.assertions import CONTEXT_LOST, LawViolation, Sighting, describe
from properties.capabilities import NotOffered
from properties.case import Case
from properties.journal import Journal
from properties.laws import Law
from properties.recorder import Tally, recorder
from properties.strategies import describe as regions

CONTEXT_LOST_STATUS = 77


class TimeIsUp(BaseException):
    """Leave Hypothesis from inside a test: it lets what is not an Exception pass."""


@dataclass(frozen=True)
class Failure:
    """A case that breaks a law.

    Attributes:
        law: name of the law.
        case: as small as it became.
        kind: see ``LawViolation.kind``; "crash", "hang" and "memory" if the process did not survive it.
        report: what a person reads, without the replay command.
        sightings: the elements compared.
        sibling_laws: other laws that the same case breaks.
        elsewhere: it went wrong on a variant of the case, which the law made; the case alone may not show it.
    """

    law: str
    case: Case
    kind: str
    report: str
    sightings: tuple[Sighting, ...] = ()
    sibling_laws: tuple[str, ...] = ()
    elsewhere: bool = False


@dataclass(frozen=True)
class Assignment:
    """A law to explore.

    Attributes:
        law: its name.
        seed: of Hypothesis.
        max_examples: cases to try.
        seconds: time to try them in, the first aside; None for no limit.
        shrink_seconds: time to make a failing case small, once there is one.
        database: folder of Hypothesis' own memory of failures; None for none.
    """

    law: str
    seed: int
    max_examples: int
    seconds: float | None = None
    shrink_seconds: float = 20.0
    database: str | None = None


@dataclass
class Outcome:
    """What exploring a law gave.

    Attributes:
        law: its name.
        tally: what was run, the cases of shrinking included.
        seconds: all of it took.
        failure: the smallest failing case found.
        cases_to_failure, seconds_to_failure: until the first failing case, itself included; 0 if there is none.
    """

    law: str
    tally: Tally
    seconds: float
    failure: Failure | None = None
    cases_to_failure: int = 0
    seconds_to_failure: float = 0.0


@dataclass
class _Watch:
    """Runs the cases of one law: journals them, keeps the time and remembers the smallest failing one."""

    law: Law
    journal: Journal | None
    deadline: float | None
    shrink_seconds: float
    tally: Tally
    failed: Failure | None = None
    shrink_deadline: float | None = field(default=None)
    first_failed: tuple[int, float] | None = None

    def run(self, case: Case) -> None:
        now = time.monotonic()
        limit = self.shrink_deadline if self.failed is not None else self.deadline
        if limit is not None and now > limit and self.tally.cases > 0:
            raise TimeIsUp
        self.try_case(case)

    def try_case(self, case: Case) -> None:
        self.tally.cases += 1
        recorder.reached(regions(case))
        if self.journal is not None:
            worst = self.tally.worst
            self.journal.begin(self.law.name, case.to_json(), worst.out, worst.lse)
        try:
            self.law.check(case)
        except HypothesisException:
            raise
        except NotOffered as lacking:
            self.tally.not_offered[str(lacking)] += 1
        except Exception as error:
            if self.journal is not None:
                _leave_if_lost(error)
            self._note(case, error)
            raise
        finally:
            if self.journal is not None:
                self.journal.end()

    def _note(self, case: Case, error: Exception) -> None:
        if self.failed is None:
            now = time.monotonic()
            self.first_failed = self.tally.cases, now
            self.shrink_deadline = now + self.shrink_seconds
        elif reduction.size(case) >= reduction.size(self.failed.case):
            return
        self.failed = failure_of(self.law.name, case, error)


def failure_of(law: str, case: Case, error: Exception) -> Failure:
    """Describe what went wrong; an exception that is no verdict is one all the same, with its last lines."""
    if isinstance(error, LawViolation):
        # A law may run other cases than its own; what replays is the law's own case.
        elsewhere = error.case != case
        return Failure(law, case, error.kind, error.report, error.sightings, elsewhere=elsewhere)
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())[:500]
    report = (
        f"{type(error).__name__}: {message}\n  raised in {last.name}, line {last.lineno} of {last.filename}\n"
        f"  case: {describe(case)}"
    )
    return Failure(law, case, "error", report)


def explore(law: Law, work: Assignment, journal: Journal | None = None) -> Outcome:
    """Try cases of a law until one fails or the time or the number of examples is used up."""
    began = time.monotonic()
    deadline = None if work.seconds is None else began + work.seconds
    tally = recorder.start()
    watch = _Watch(law, journal, deadline, work.shrink_seconds, tally)

    @functools.wraps(law.check)
    def watched(case: Case) -> None:
        watch.run(case)

    database: ExampleDatabase | None = DirectoryBasedExampleDatabase(work.database) if work.database else None
    profile = settings(
        max_examples=work.max_examples,
        deadline=None,
        database=database,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        # The clock is a law's own business here; a slow machine is not a failing law.
        suppress_health_check=[HealthCheck.too_slow],
    )
    test = seed(work.seed)(profile(given(case=law.cases)(watched)))
    try:
        test()
    except TimeIsUp:
        pass
    except NotOffered as lacking:  # nothing that the law could draw
        tally.not_offered[str(lacking)] += 1
        tally.cases += 1
    except Exception as error:
        if watch.failed is None:  # not the law but the search itself: a strategy or a health check
            watch.failed = _search_error(law, error)
    if watch.failed is not None and watch.failed.kind not in ("error", "search"):
        _reduce(watch, time.monotonic() + work.shrink_seconds / 2)
    outcome = Outcome(law.name, tally, time.monotonic() - began, watch.failed)
    if watch.first_failed is not None:
        outcome.cases_to_failure, when = watch.first_failed
        outcome.seconds_to_failure = when - began
    return outcome


def _leave_if_lost(error: Exception) -> None:
    """End a worker whose CUDA context is gone, the case still in its journal: nothing more can run in it."""
    if isinstance(error, LawViolation) and error.kind == CONTEXT_LOST:
        os._exit(CONTEXT_LOST_STATUS)


def _search_error(law: Law, error: Exception) -> Failure:
    message = " ".join(str(error).split())[:500]
    return Failure(law.name, Case(), "search", f"drawing cases failed: {type(error).__name__}: {message}")


def _reduce(watch: _Watch, deadline: float) -> None:
    assert watch.failed is not None
    kind = watch.failed.kind

    def fails(case: Case) -> bool:
        before = watch.failed
        try:
            watch.try_case(case)
        except Exception as error:
            same = isinstance(error, LawViolation) and error.kind == kind
            if not same:
                watch.failed = before
            return same
        return False

    reduction.reduce(watch.failed.case, fails, deadline)


def check(law: Law, case: Case, journal: Journal | None = None) -> Failure | NotOffered | None:
    """Run one law on one case; None if it holds."""
    recorder.start()
    if journal is not None:
        journal.begin(law.name, case.to_json())
    try:
        law.check(case)
    except NotOffered as lacking:
        return lacking
    except Exception as error:
        if journal is not None:
            _leave_if_lost(error)
        return failure_of(law.name, case, error)
    finally:
        if journal is not None:
            journal.end()
    return None
