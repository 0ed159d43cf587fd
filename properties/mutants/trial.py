"""One mutant on trial: the laws look for a case that it breaks, and the shipped source must pass that case."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from properties import subjects
from properties.assertions import describe
from properties.case import Case
from properties.exploring import Assignment, Failure, Outcome
from properties.mutants.mutant import Mutant, write_mutated
from properties.pool import Answer, Death, Worker
from properties.verify import WHAT_DIED_DID, ask
from properties.worker import Call, Check

KILLED, SURVIVED, UNSOUND = "killed", "survived", "unsound"
# Of a law's cases, the share tried before the next law is.
FIRST_LOOK = 0.2
FIRST_LOOK_AT_OTHERS = 0.05
SIBLING_SECONDS = 2.0
BASELINE_SECONDS = 120.0


@dataclass(frozen=True)
class Effort:
    """How hard the laws try.

    Attributes:
        max_examples: cases of each law.
        seconds: of one mutant, to its first failing case.
        shrink_seconds: to make the case small.
        seed: the same cases every time.
        siblings: whether to ask the other laws about the case that one found.
        baselines: whether to run the two baselines.
        case_seconds: a case that takes longer is a hang.
    """

    max_examples: int
    seconds: float
    shrink_seconds: float
    seed: int = 0
    siblings: bool = True
    baselines: bool = True
    case_seconds: float = 20.0


# A GPU compiles several kernels for the first case of a dtype.
GPU_CASE_SECONDS = 120.0


@dataclass
class Verdict:
    """What became of a mutant.

    Attributes:
        mutant: the mutant.
        outcome: KILLED; SURVIVED; or UNSOUND: the case found fails on the shipped source too.
        laws: that see it on the minimal case, the one that found it first.
        kind: of failure, see ``LawViolation.kind``.
        cases: tried until the kill, or altogether.
        seconds: until the kill, or altogether; starting the worker included.
        total_seconds: with making the case small, the other laws and the baselines.
        case: the minimal case.
        report: of its failure.
        baselines: name -> whether it would have killed the mutant.
        laws_digest: says which laws those were, see ``record.laws_digest``.
    """

    mutant: Mutant
    outcome: str = SURVIVED
    laws: tuple[str, ...] = ()
    kind: str = ""
    cases: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    case: Case | None = None
    report: str = ""
    baselines: dict[str, bool] = field(default_factory=dict)
    laws_digest: str = ""

    @property
    def tokens(self) -> int | None:
        """Tokens of the minimal case, cached and new, all rows."""
        return None if self.case is None else sum(row.cached + sum(row.new) for row in self.case.rows)

    @property
    def summary(self) -> str:
        """The minimal case in a line."""
        return "" if self.case is None else describe(self.case)


class Original:
    """The shipped source, in a process of its own; asked by several threads."""

    def __init__(self, folder: Path, device: str, case_seconds: float) -> None:
        """Start it."""
        self._worker = Worker(folder, 0, "flashcore", device)
        self._lock = threading.Lock()
        self._case_seconds = case_seconds

    def laws(self) -> list[str]:
        """The names of all laws."""
        return list(self._worker.ready().laws)

    def kernels(self) -> list[str]:
        """The kernels that can be forced on this device."""
        answer = ask(self._worker, Call("properties.mutants.trial:kernel_names"), self._case_seconds)
        assert not isinstance(answer, Death), answer.how
        return list(answer.value)

    def description(self) -> str:
        """Device and versions."""
        return self._worker.ready().description

    def failure(self, law: str, case: Case) -> str | None:
        """How a law fails on a case, if it does."""
        with self._lock:
            answer = ask(self._worker, Check(law, case), self._case_seconds)
        if isinstance(answer, Death):
            return answer.how
        return answer.value.report if isinstance(answer.value, Failure) else None

    def baselines(self) -> dict[str, bool]:
        """Which baselines fail: none should."""
        with self._lock:
            return _baselines(self._worker)

    def stop(self) -> None:
        """End it."""
        self._worker.stop()


def order(mutant: Mutant, laws: Sequence[str]) -> list[str]:
    """All laws, those that the mutant's words name first."""
    likely = [name for words in mutant.laws for name in laws if words in name]
    return list(dict.fromkeys([*likely, *laws]))


def assignments(mutant: Mutant, laws: Sequence[str], effort: Effort) -> Iterator[Assignment]:
    """What to try, in order: the likely laws, then the others, each time with a look at every one first."""
    ordered = order(mutant, laws)
    likely = [name for name in ordered if any(words in name for words in mutant.laws)]
    others = [name for name in ordered if name not in likely]
    for group, share in ((likely, FIRST_LOOK), (others, FIRST_LOOK_AT_OTHERS)):
        first = max(1, round(effort.max_examples * share))
        for stage, examples in enumerate((first, effort.max_examples - first)):
            for name in group if examples else ():
                seed = zlib.crc32(f"{effort.seed} {name} {stage}".encode())
                yield Assignment(name, seed, examples, shrink_seconds=effort.shrink_seconds)


def try_mutant(mutant: Mutant, effort: Effort, original: Original, device: str = "auto") -> Verdict:
    """Let the laws look for a case that the mutant breaks."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"mutant-{mutant.id}-") as name:
        folder = Path(name)
        write_mutated(mutant, folder)
        if mutant.of_the_suite:
            verdict = _try_suite(mutant, folder)
        else:
            worker = Worker(folder, 0, "flashcore", device, first_on_path=str(folder))
            try:
                verdict = _try_kernel(mutant, effort, original, worker, folder)
            finally:
                worker.stop()
    verdict.total_seconds = time.monotonic() - began
    return verdict


def _try_kernel(mutant: Mutant, effort: Effort, original: Original, worker: Worker, folder: Path) -> Verdict:
    verdict = Verdict(mutant)
    began = time.monotonic()
    laws = list(worker.ready().laws)
    under_test = ask(worker, Call("properties.mutants.trial:package_folder"), effort.case_seconds)
    if not isinstance(under_test, Answer) or Path(under_test.value) != folder / "flashcore":
        raise RuntimeError(f"{mutant.id}: the mutated copy must be under test, got {under_test}")
    failure: Failure | None = None
    for work in assignments(mutant, laws, effort):
        left = effort.seconds - (time.monotonic() - began)
        if left <= 0:
            break
        started = time.monotonic() - began
        worker.give(Assignment(**{**vars(work), "seconds": left}))
        answer = _collect(worker, effort.case_seconds)
        if isinstance(answer, Death):
            failure = Failure(answer.law, answer.case or Case(), answer.kind, answer.how)
            verdict.cases += answer.cases
            verdict.seconds = time.monotonic() - began
        else:
            outcome: Outcome = answer.value
            failure = outcome.failure
            verdict.cases += outcome.cases_to_failure if failure else outcome.tally.cases
            verdict.seconds = started + (outcome.seconds_to_failure if failure else outcome.seconds)
        if failure is not None:
            _judge(verdict, failure, original)
            break
    if failure is not None and effort.siblings and failure.kind not in WHAT_DIED_DID:
        verdict.laws += _siblings(worker, laws, failure, effort.case_seconds)
    if effort.baselines:
        verdict.baselines = _baselines(worker)
    return verdict


def kernel_names() -> list[str]:
    """The kernels of the subject that can be forced."""
    return list(subjects.active().paths)


def package_folder() -> str:
    """Where the flashcore of this process lies."""
    import flashcore

    return str(Path(flashcore.__file__).parent)


def _collect(worker: Worker, case_seconds: float) -> Answer | Death:
    while True:
        answer = worker.collect(case_seconds, patience=0.5)
        if isinstance(answer, Answer | Death):
            return answer


def _judge(verdict: Verdict, failure: Failure, original: Original) -> None:
    """A failing case is a kill if the shipped source passes it."""
    verdict.laws, verdict.case, verdict.kind = (failure.law,), failure.case, failure.kind
    verdict.report = failure.report
    verdict.outcome = KILLED
    if failure.kind == "search":
        verdict.outcome = UNSOUND
        return
    also = original.failure(failure.law, failure.case)
    if also is not None:
        verdict.outcome, verdict.report = UNSOUND, f"the shipped source fails on this case too: {also}"


def _siblings(worker: Worker, laws: Sequence[str], failure: Failure, case_seconds: float) -> tuple[str, ...]:
    deadline = time.monotonic() + SIBLING_SECONDS
    seen = []
    for name in laws:
        if name != failure.law and time.monotonic() < deadline:
            answer = ask(worker, Check(name, failure.case), case_seconds)
            if isinstance(answer, Death) or isinstance(answer.value, Failure):
                seen.append(name)
    return tuple(seen)


def _baselines(worker: Worker) -> dict[str, bool]:
    """Which baselines fail on the worker's kernel; one that does not come back fails."""
    from properties.mutants.baselines import BASELINES

    failed = {}
    for name, function in BASELINES.items():
        answer = ask(worker, Call(f"properties.mutants.baselines:{function}"), BASELINE_SECONDS)
        failed[name] = isinstance(answer, Death) or bool(answer.value)
    return failed


def _try_suite(mutant: Mutant, folder: Path) -> Verdict:
    """A fault of the assertions is killed by the tests of the assertions; they pass on the shipped source in CI."""
    verdict = Verdict(mutant)
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
    done = subprocess.run(
        [*command, "tests/test_assertions.py", "tests/test_runner.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    verdict.seconds = time.monotonic() - began
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == 1 and failed:
        verdict.outcome, verdict.laws, verdict.kind = KILLED, tuple(failed), "test of the suite"
    elif done.returncode != 0:
        raise RuntimeError(f"{mutant.id}: the tests of the assertions must run, got {done.stdout[-500:]}{done.stderr}")
    return verdict
