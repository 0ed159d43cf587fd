"""``python -m properties verify``: all laws over generated cases, in worker processes, within a time."""

from __future__ import annotations

import json
import os
import random
import time
import zlib
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from properties import case_file, laws, reduction
from properties.assertions import describe
from properties.capabilities import NotOffered
from properties.case import Case
from properties.exploring import Assignment, Failure, Outcome
from properties.noise import clean_chi, judge
from properties.pool import Answer, Death, Pool, Worker, WorkerError
from properties.progress import Line, Moment, Progress, table
from properties.recorder import Tally
from properties.strategies import REGIONS
from properties.worker import Call, Check, Save

__all__ = ["PROFILES", "Options", "WorkerError", "verify", "workers_for"]

EXIT_HOLDS, EXIT_FAILS, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
REGRESSIONS = Path("fixtures/regressions")
CANDIDATES = Path("fixtures/candidates")
DATABASE = ".hypothesis/examples"

# Shares of a law's time: a short look at every law first, so that an easy fault shows at once. A look takes at least
# this many seconds, the first less where the time of the run is not enough for all laws, a second none once it is over.
FIRST_LOOK = 0.2
SHORTEST_SLICE = 1.0
# After the first failure the other laws get this much each, and their failures are shrunk this long.
SECONDS_AFTER_FAILURE = 3.0
SHRINK_AFTER_FAILURE = 3.0
SIBLING_SECONDS = 8.0
CRASH_REDUCTION_SECONDS = 25.0
REGIONS_SHOWN = 6
WHAT_DIED_DID = {
    "crash": "killed its process",
    "hang": "did not return",
    "memory": "took too much memory",
}
HINTS = {
    "crash": "",
    "hang": "; if it is only slow, raise --case-seconds",
    "memory": "; if it needs that much, raise --worker-gib",
}
# While a hang is being reduced, a case counts as one after ten times what the others took, at least this long (and
# this long while none has come back); the final case gets the full limit.
SHORTEST_HANG_SECONDS = 1.0
FIRST_HANG_SECONDS = 3.0
# What a case may take where the command line does not say; compiling is no hang.
CASE_SECONDS, SLOW_CASE_SECONDS = 30.0, 300.0


@dataclass(frozen=True)
class Profile:
    """How much a run tries.

    Attributes:
        seconds: of the whole run; None: until the examples are used up.
        max_examples: for each law; None: until the time is used up.
        fixed_seed: the same cases every time.
        shrink_seconds: for the first failing law.
    """

    seconds: float | None
    max_examples: int | None
    fixed_seed: bool = False
    shrink_seconds: float = 20.0


PROFILES = {
    "dev": Profile(seconds=110.0, max_examples=None),
    "ci": Profile(seconds=None, max_examples=100, fixed_seed=True),
    "nightly": Profile(seconds=None, max_examples=5000, shrink_seconds=120.0),
}
UNLIMITED = 1_000_000


@dataclass(frozen=True)
class Options:
    """What the command line said; None where it said nothing."""

    profile: str = "dev"
    law: str | None = None
    max_examples: int | None = None
    seconds: float | None = None
    seed: int | None = None
    device: str = "auto"
    subject: str = "flashcore"
    json_path: Path | None = None
    workers: int = 1
    gpus: int = 0
    case_seconds: float | None = None
    worker_bytes: int | None = None
    regressions: Path = REGRESSIONS
    candidates: Path = CANDIDATES
    database: str | None = DATABASE


@dataclass
class _Unit:
    """A piece of work: some examples, or some time, of one law."""

    law: str
    seed: int
    max_examples: int
    weight: float


@dataclass
class _Result:
    """What is known of one law."""

    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    failure: Failure | None = None
    rounds: int = 0

    @property
    def verdict(self) -> str:
        if self.failure is not None:
            return "FAILS"
        if self.tally.cases == 0:
            return "not run"
        return "holds" if self.judged else "not offered"

    @property
    def lacks(self) -> str:
        """What most of its cases asked for in vain."""
        return self.tally.not_offered.most_common(1)[0][0]

    @property
    def judged(self) -> int:
        """Cases that the subject took."""
        return self.tally.cases - self.tally.not_offered.total()


class Verification:
    """One run of ``verify``."""

    def __init__(self, options: Options, progress: Progress) -> None:
        """Nothing is started yet."""
        self.options = options
        self.progress = progress
        profile = PROFILES[options.profile]
        self.shrink_seconds = profile.shrink_seconds
        self.seconds = options.seconds if options.seconds is not None else profile.seconds
        self.max_examples = options.max_examples if options.max_examples is not None else profile.max_examples
        if options.max_examples is not None and options.seconds is None:
            self.seconds = None  # asked for a number of cases: take the time they need
        if options.seconds is not None and options.max_examples is None:
            self.max_examples = None
        self.seed = options.seed
        if self.seed is None:
            self.seed = 0 if profile.fixed_seed else random.SystemRandom().randrange(1 << 31)
        self.results: dict[str, _Result] = {}
        self.sentences: dict[str, str] = {}
        self.not_offered: dict[str, str] = {}
        self.not_owed: list[str] = []
        self.has_lse = True
        self.case_seconds = CASE_SECONDS
        self.description = ""
        self.versions: dict[str, str] = {}
        self.regressions: list[dict[str, str]] = []
        self.began = time.monotonic()
        self.serial = 0
        self.noisy = False

    def run(self) -> int:
        """Do everything; the exit status."""
        options = self.options
        pool = Pool(options.workers, options.subject, options.device, options.gpus, options.worker_bytes)
        interrupted = False
        try:
            ready = pool.workers[0].ready()
            self.description, self.versions = ready.description, ready.versions
            self.sentences, self.has_lse = ready.laws, ready.has_lse
            self.case_seconds = options.case_seconds or (SLOW_CASE_SECONDS if ready.is_slow else CASE_SECONDS)
            chosen = laws.select_names([*ready.laws, *ready.not_offered], options.law)
            self.results = {name: _Result() for name in chosen if name in ready.laws}
            self.not_offered = ready.not_offered
            self.not_owed = [name for name in chosen if name in ready.not_offered]
            self.progress.say(f"device: {ready.description}")
            self.progress.say(
                f"subject: {options.subject}; {len(self.results)} laws, {len(pool.workers)} workers, seed {self.seed}"
            )
            self._replay_regressions(pool)
            self._explore(pool)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.progress.close()
            pool.stop()
        self._report(interrupted)
        if interrupted:
            return EXIT_INTERRUPTED
        return EXIT_FAILS if self._failed() else EXIT_HOLDS

    def _failed(self) -> bool:
        failing = any(r.failure for r in self.results.values())
        return failing or self.noisy or any(r["verdict"] not in ("holds", "not offered") for r in self.regressions)

    def _left(self) -> float | None:
        return None if self.seconds is None else self.seconds - (time.monotonic() - self.began)

    # -- regressions -------------------------------------------------------------------------------------------

    def _replay_regressions(self, pool: Pool) -> None:
        """Every stored regression, before anything new is tried."""
        worker = pool.workers[0]
        for path in sorted(self.options.regressions.glob("*.json")):
            stored = case_file.CaseFile.read(path)  # a broken regression is an error of usage, not a verdict
            name = laws.name_of(stored.law)
            if name in self.not_offered:
                verdict, report = "not offered", ""
            elif name not in self.sentences:
                verdict, report = "unknown law", f"{path}: no law is called {stored.law}"
            else:
                found = self._try(worker, name, stored.case)
                verdict, report = "holds", ""
                if isinstance(found, NotOffered):
                    verdict = "not offered"
                elif found is not None:
                    verdict, report = "FAILS", f"regression {path} fails again\n{found.report}"
            self.regressions.append({"file": str(path), "verdict": verdict})
            if report:
                self.progress.say(report)
        if self.regressions:
            held = sum(r["verdict"] == "holds" for r in self.regressions)
            judged = sum(r["verdict"] != "not offered" for r in self.regressions)
            self.progress.say(f"regressions: {held} of {judged} hold")

    # -- exploration -------------------------------------------------------------------------------------------

    def _units(self, workers: int) -> deque[_Unit]:
        """What to do, in order: a first look at every law, then the rest, in shards that fill all workers."""
        shards = max(1, -(-2 * workers // max(1, len(self.results))))
        units: deque[_Unit] = deque()
        if self.max_examples is not None:
            first = max(1, int(self.max_examples * FIRST_LOOK))
            rest = self.max_examples - first
            sizes = [first] + [rest // shards + (i < rest % shards) for i in range(shards)]
        else:
            sizes = [UNLIMITED] * (shards + 1)
        weights = [FIRST_LOOK] + [(1 - FIRST_LOOK) / shards] * shards
        for size, weight in zip(sizes, weights, strict=True):
            units.extend(_Unit(name, self._next_seed(name), size, weight) for name in self.results if size)
        return units

    def _next_seed(self, law: str) -> int:
        self.serial += 1
        return zlib.crc32(f"{self.seed} {law} {self.serial}".encode())

    def _explore(self, pool: Pool) -> None:
        units = self._units(len(pool.workers))
        while True:
            for worker in pool.idle():
                unit = self._next_unit(units, pool)
                if unit is not None:
                    self._assign(worker, unit, units, pool)
            if not pool.busy():
                return
            pool.wait(0.2)
            for worker in pool.busy():
                answer = worker.collect(self.case_seconds)
                if isinstance(answer, Death):
                    self._died(worker, answer)
                elif isinstance(answer, Answer):
                    self._finished(worker, answer.value)
            self._show(pool)

    def _next_unit(self, units: deque[_Unit], pool: Pool) -> _Unit | None:
        failing = any(r.failure for r in self.results.values())
        left = self._left()
        is_over = left is not None and left < SHORTEST_SLICE
        at_work = {self._law_of(worker) for worker in pool.busy()}
        while units:
            unit = units.popleft()
            result = self.results[unit.law]
            if result.failure is not None:
                continue
            if (failing or is_over) and (result.rounds > 0 or unit.law in at_work):
                continue
            return unit
        if failing or left is None or left < 2 * SHORTEST_SLICE or self.max_examples is not None or not self.results:
            return None
        # Time is left over: more of the law with the least time.
        name = min(self.results, key=lambda law: self.results[law].seconds)
        return _Unit(name, self._next_seed(name), UNLIMITED, 1.0)

    def _assign(self, worker: Worker, unit: _Unit, units: deque[_Unit], pool: Pool) -> None:
        failing = any(r.failure for r in self.results.values())
        slice_seconds: float | None = None
        left = self._left()
        if left is not None:
            waiting = sum(u.weight for u in units if self.results[u.law].failure is None)
            share = unit.weight / (unit.weight + waiting)
            unseen = sum(r.rounds == 0 for r in self.results.values())
            shortest = min(SHORTEST_SLICE, left * len(pool.workers) / max(1, unseen))
            slice_seconds = max(shortest, min(left, left * share * len(pool.workers)))
        if failing:
            slice_seconds = (
                SECONDS_AFTER_FAILURE if slice_seconds is None else min(slice_seconds, SECONDS_AFTER_FAILURE)
            )
        worker.give(
            Assignment(
                unit.law,
                unit.seed,
                unit.max_examples,
                slice_seconds,
                SHRINK_AFTER_FAILURE if failing else self.shrink_seconds,
                self.options.database,
            )
        )

    def _finished(self, worker: Worker, outcome: Outcome) -> None:
        result = self.results[outcome.law]
        result.tally += outcome.tally
        result.seconds += outcome.seconds
        result.rounds += 1
        if outcome.failure is not None and result.failure is None:
            self._failure(worker, outcome.failure)

    def _died(self, worker: Worker, death: Death) -> None:
        """A dead worker is a failing case of the law it was at."""
        result = self.results.get(death.law)
        if result is None:
            self.progress.say(f"a worker died between two cases: {death.how}")
            return
        result.rounds += 1
        result.tally.cases += death.cases
        if result.failure is not None:
            return
        what, hint = WHAT_DIED_DID[death.kind], HINTS[death.kind]
        if death.case is None:
            report = f"the kernel {what}\n  {death.how}, on a case that was not noted"
            result.failure = Failure(death.law, Case(), death.kind, report)
            self.progress.say(f"\nFAILED: {self.sentences[death.law]}\n{report}\n")
            return
        case, how = death.case, death.how
        known = any(r.failure is not None and r.failure.kind == death.kind for r in self.results.values())
        if known:  # the case shown first is the one to look at; another law met the same
            self.progress.say(f"{death.law.replace('_', ' ')}: the kernel {what} here too ({how})")
        else:
            self.progress.say(f"{death.law.replace('_', ' ')}: the kernel {what} ({how}); reducing the case")
            case, how = self._reduce_death(worker, death)
        failure = Failure(death.law, case, death.kind, f"the kernel {what}\n  {how}{hint}\n  case: {describe(case)}")
        if known:
            result.failure = failure
        else:
            self._failure(worker, failure)

    def _reduce_death(self, worker: Worker, death: Death) -> tuple[Case, str]:
        """The smallest case that still kills or hangs a worker; each trial that does costs a restart."""
        assert death.case is not None
        longest = 0.0  # that a case took which came back

        def dies(case: Case, seconds: float) -> Death | None:
            nonlocal longest
            began = time.monotonic()
            answer = self._ask(worker, Check(death.law, case), seconds)
            if isinstance(answer, Death):
                worker.ready()
                return answer if answer.kind == death.kind else None
            longest = max(longest, time.monotonic() - began)
            return None

        def fails(case: Case) -> bool:
            if death.kind != "hang":
                return dies(case, self.case_seconds) is not None
            patience = 10 * longest if longest else FIRST_HANG_SECONDS
            return dies(case, min(max(patience, SHORTEST_HANG_SECONDS), self.case_seconds)) is not None

        seconds = min(CRASH_REDUCTION_SECONDS, (self.seconds or UNLIMITED) / 4)
        small = reduction.reduce(death.case, fails, time.monotonic() + seconds)
        confirmed = dies(small, self.case_seconds)
        if confirmed is not None:
            return small, confirmed.how
        again = dies(death.case, self.case_seconds)
        return death.case, again.how if again else f"{death.how}, once; it did not happen again"

    def _failure(self, worker: Worker, failure: Failure) -> None:
        """Show it, store it, and see which other laws the case breaks."""
        if failure.kind not in (*WHAT_DIED_DID, "search"):
            deadline = time.monotonic() + SIBLING_SECONDS
            broken = []
            for name in self.results:
                if name != failure.law and time.monotonic() < deadline:
                    sibling = self._try(worker, name, failure.case)
                    broken += [name] if isinstance(sibling, Failure) else []
            failure = replace(failure, sibling_laws=tuple(broken))
        self.results[failure.law].failure = failure
        seconds = time.monotonic() - self.began
        text = f"\nFAILED after {seconds:.0f} s: {self.sentences[failure.law]}\n"
        if failure.kind == "search":
            text += failure.report
        else:
            answer = self._ask(worker, Save(failure, str(self.options.candidates)), 120.0)
            text += answer.value if isinstance(answer, Answer) else failure.report
        self.progress.say(text + "\n")

    def _try(self, worker: Worker, law: str, case: Case) -> Failure | NotOffered | None:
        """Run one law on one case; death is a failure."""
        answer = self._ask(worker, Check(law, case), self.case_seconds)
        if isinstance(answer, Death):
            return Failure(law, case, answer.kind, f"the kernel: {answer.how}\n  case: {describe(case)}")
        found: Failure | NotOffered | None = answer.value
        return found

    @staticmethod
    def _ask(worker: Worker, task: Check | Save, case_seconds: float) -> Answer | Death:
        return ask(worker, task, case_seconds)

    # -- what is shown -----------------------------------------------------------------------------------------

    @staticmethod
    def _law_of(worker: Worker) -> str:
        return getattr(worker.task, "law", "")

    def _show(self, pool: Pool) -> None:
        entries = [worker.entry() for worker in pool.workers]
        worst = [max(r.tally.worst.out, r.tally.worst.lse) for r in self.results.values()]
        worst += [max(entry.worst_out, entry.worst_lse) for entry in entries]
        self.progress.show(
            Moment(
                cases=sum(entry.cases for entry in entries),
                seconds=time.monotonic() - self.began,
                total_seconds=self.seconds,
                laws=tuple(sorted({self._law_of(w).replace("_", " ") for w in pool.busy()} - {""})),
                worst=max(worst, default=0.0),
                failing=sum(r.failure is not None for r in self.results.values()),
            )
        )

    def _report(self, interrupted: bool) -> None:
        lines = []
        for name, r in self.results.items():
            compared = r.tally.calls > 0
            out, lse = (r.tally.worst.out, r.tally.worst.lse) if compared else (None, None)
            verdict = r.verdict if r.judged or not r.tally.not_offered else f"{r.verdict}: {r.lacks}"
            lines.append(Line(name, r.judged, out, lse if self.has_lse else None, r.seconds, verdict))
        lines += [Line(n, 0, None, None, 0.0, f"not offered: {self.not_offered[n]}") for n in self.not_owed]
        seconds = time.monotonic() - self.began
        if lines:
            self.progress.say("\n" + table(lines))
        self._report_alarm()
        self.noisy = self._report_noise()
        self._report_regions()
        cases = sum(line.cases for line in lines)
        failing = [name for name, r in self.results.items() if r.failure is not None]
        judged = sum(r.verdict != "not offered" for r in self.results.values())
        verdict = f"{len(failing)} of {judged} laws fail" if failing else "all laws hold"
        if judged < len(lines):
            verdict += f" of the {judged} that can be judged" * (not failing)
            verdict += f", {len(lines) - judged} are not offered"
        verdict = verdict if judged else "no law that was asked for is owed"
        verdict += "; the pooled errors are not rounding noise" * self.noisy
        if any(r["verdict"] not in ("holds", "not offered") for r in self.regressions):
            verdict += "; a regression is back"
        if interrupted:
            verdict = "interrupted; " + (verdict if failing else "no law failed so far")
        self.progress.say(f"\n{cases} cases in {seconds:.0f} s ({cases / max(seconds, 1e-9):.0f}/s): {verdict}")
        if self.options.json_path is not None:
            text = json.dumps(self._record(seconds, interrupted), indent=1) + "\n"
            self.options.json_path.write_text(text)

    def _total(self) -> Tally:
        """What all laws saw."""
        total = Tally()
        for r in self.results.values():
            total += r.tally
        return total

    def _report_alarm(self) -> None:
        """A row for the alarm; where it came back, a law has failed."""
        alarm = self._total().alarm
        if alarm.judged:
            self.progress.say(
                f"alarm: no error above {alarm.worst:.2f} x alarm in {alarm.judged} cases, raised in {alarm.raised}, "
                f"came back on fresh data in {alarm.came_back}"
            )

    def _report_noise(self) -> bool:
        """A row for each pool of errors; whether one is not rounding noise."""
        alarmed = False
        for name, pool in sorted(self._total().noise.items()):
            fmt, _, model = name.partition(", ")
            statistics, chi = pool.statistics(), clean_chi(fmt, model)
            if chi is None or not statistics.outputs:
                continue
            _, alarms = judge(statistics, chi)
            alarmed |= bool(alarms)
            self.progress.say(
                f"noise, {fmt}: chi {statistics.chi:.3f} (clean {chi:.3f}), bias z {statistics.bias:+.2f}, "
                f"largest |r| {statistics.largest:.2f} over {statistics.outputs:,} outputs: "
                f"{'; '.join(alarms) or 'rounding'}"
            )
        return alarmed

    def _report_regions(self) -> None:
        """Which named regions of the input space no case of this run lay in."""
        reached = {region for r in self.results.values() for region, count in r.tally.regions.items() if count}
        missed = [region for region in REGIONS if region not in reached]
        if not reached or not missed:
            return
        shown = ", ".join(missed[:REGIONS_SHOWN])
        more = f" and {len(missed) - REGIONS_SHOWN} more" if len(missed) > REGIONS_SHOWN else ""
        self.progress.say(f"\nregions reached: {len(REGIONS) - len(missed)} of {len(REGIONS)}; not: {shown}{more}")

    def _record(self, seconds: float, interrupted: bool) -> dict[str, Any]:
        return {
            "subject": self.options.subject,
            "device": self.description,
            "versions": self.versions,
            "profile": self.options.profile,
            "seed": self.seed,
            "seconds": round(seconds, 3),
            "interrupted": interrupted,
            "regressions": self.regressions,
            "not_offered": {name: self.not_offered[name] for name in self.not_owed},
            "laws": [
                {
                    "law": name,
                    "cases": r.tally.cases,
                    "calls": r.tally.calls,
                    "not_offered": dict(r.tally.not_offered),
                    "worst_out": r.tally.worst.out,
                    "worst_lse": r.tally.worst.lse,
                    "seconds": round(r.seconds, 3),
                    "verdict": r.verdict,
                    "regions": dict(sorted(r.tally.regions.items())),
                    "failure": None if r.failure is None else _failure_record(r.failure),
                }
                for name, r in self.results.items()
            ],
        }


def _failure_record(failure: Failure) -> dict[str, Any]:
    return {
        "kind": failure.kind,
        "report": failure.report,
        "case": json.loads(failure.case.to_json()),
        "sibling_laws": list(failure.sibling_laws),
    }


def ask(worker: Worker, task: Check | Save | Call, case_seconds: float) -> Answer | Death:
    """Give a task to an idle worker and wait for the answer."""
    worker.give(task)
    while True:
        answer = worker.collect(case_seconds, patience=0.2)
        if isinstance(answer, Answer | Death):
            return answer


def verify(options: Options, progress: Progress | None = None) -> int:
    """Run all laws; the exit status."""
    return Verification(options, Progress() if progress is None else progress).run()


def workers_for(device: str, asked: int | None) -> tuple[int, int]:
    """How many workers, and over how many GPUs: one a core on the CPU, one a GPU."""
    gpus = 0 if device == "cpu" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else _count_gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or gpus or cores, gpus


def _count_gpus() -> int:
    """Without importing torch, which costs seconds here and again in every worker."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
