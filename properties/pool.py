"""Worker processes that may die or hang without taking the run with them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from properties.case import Case, CaseError
from properties.exploring import CONTEXT_LOST_STATUS
from properties.journal import Entry, Journal
from properties.worker import Ready, Setup, Task, main

START_SECONDS = 300.0
# Of the machine's memory, what one worker may hold unless somebody says otherwise.
MEMORY_SHARE = 0.5


class WorkerError(RuntimeError):
    """A worker cannot start: bad device, subject or law. One line for the user."""


def _context() -> Any:
    """How processes are started: from a server that has imported torch and has neither threads nor CUDA.

    Forking this process, which may have both, is never safe; a fresh interpreter for each restart would spend two
    seconds on imports, and reducing a crash takes a dozen restarts.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hypothesis", "properties.exploring"])
    return context


@dataclass(frozen=True)
class Death:
    """A worker died or had to be killed in the middle of a case.

    Attributes:
        kind: "crash", "hang" or "memory".
        law: the law at work.
        case: the case; None if it could not be read back.
        how: in words: the signal or exit status, the time waited, or the memory held.
        cases: cases begun since the worker was given its task.
    """

    kind: str
    law: str
    case: Case | None
    how: str
    cases: int = 0


class Worker:
    """One worker process, its pipe and its journal."""

    def __init__(
        self,
        folder: Path,
        number: int,
        subject: str,
        device: str,
        gpu: int | None = None,
        first_on_path: str = "",
        memory: int | None = None,
    ) -> None:
        """Start the process, which may hold ``memory`` bytes; ``ready`` waits for it."""
        self.number = number
        self.memory = int(MEMORY_SHARE * _machine_memory()) if memory is None else memory
        self.task: Task | None = None
        self._path = folder / f"worker-{number}"
        self._setup = Setup(subject, device, str(self._path), gpu, first_on_path)
        self._journal = Journal(self._path)
        self._cases_before = 0
        self._timed = (-1.0, 0.0, 0.0)  # when the case began, when it was seen, and what had been waited then
        self._start()

    def _start(self) -> None:
        context = _context()
        ours, theirs = context.Pipe()
        self.connection: Connection = ours
        self.process: BaseProcess = context.Process(target=main, args=(theirs, self._setup), daemon=True)
        self.process.start()
        theirs.close()
        self.description: Ready | None = None

    def ready(self) -> Ready:
        """Wait until the worker has imported everything.

        Raises:
            WorkerError: it cannot work.
        """
        if self.description is None:
            deadline = time.monotonic() + START_SECONDS
            try:
                if not self.connection.poll(deadline - time.monotonic()):
                    raise WorkerError(f"a worker must start within {START_SECONDS:.0f} s, and did not")
                self.description = self.connection.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                how = _how_it_ended(self.process.exitcode)
                raise WorkerError(f"a worker died while importing the subject: {how}") from None
        if self.description.error:
            raise WorkerError(self.description.error)
        return self.description

    def give(self, task: Task) -> None:
        """Hand over a task; ``collect`` gives the answer."""
        self.ready()
        self.task = task
        self._cases_before = self.entry().cases
        self.connection.send(task)

    def entry(self) -> Entry:
        """What it is doing."""
        return self._journal.read()

    def collect(self, case_seconds: float, patience: float = 0.0) -> Any:
        """The answer to the task, a ``Death``, or None if it is still at work.

        Args:
            case_seconds: a case that runs longer than this is a hang; time in which others had the processor does not
                count.
            patience: how long to wait for the answer.
        """
        try:
            if self.connection.poll(patience):
                answer = self.connection.recv()
                self.task = None
                return Answer(answer)
        except (EOFError, ConnectionResetError, BrokenPipeError):
            self.process.join()
            return self._death("crash", _how_it_ended(self.process.exitcode))
        entry = self.entry()
        if entry.running and self._ran(entry) > case_seconds:
            self.process.kill()
            self.process.join()
            return self._death("hang", f"did not return within {case_seconds:.0f} s")
        held = _held(self.process.pid)
        if entry.running and held > self.memory:
            self.process.kill()
            self.process.join()
            return self._death(
                "memory", f"held {held / 2**30:.1f} GiB, more than the {self.memory / 2**30:.1f} allowed"
            )
        return None

    def _ran(self, entry: Entry) -> float:
        """Seconds since the running case was first seen, without those in which the process waited for a processor.

        Not since it began: how long the process waited before it was seen is not known.
        """
        began, seen, waited_before = self._timed
        if began != entry.began:
            seen, waited_before = time.monotonic(), _waited(self.process.pid)
            self._timed = entry.began, seen, waited_before
        return time.monotonic() - seen - (_waited(self.process.pid) - waited_before)

    def _death(self, kind: str, how: str) -> Death:
        entry = self.entry()
        try:
            case = Case.from_json(entry.case_json) if entry.running else None
        except CaseError:
            case = None
        self.connection.close()
        self.task = None
        self._start()
        self._journal.end()
        return Death(kind, entry.law, case, how, entry.cases - self._cases_before)

    def stop(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self._journal.close()


@dataclass(frozen=True)
class Answer:
    """A worker's answer, wrapped so that an answer of None is not taken for no answer."""

    value: Any


class Pool:
    """A number of workers."""

    def __init__(self, size: int, subject: str, device: str, gpus: int = 0, memory: int | None = None) -> None:
        """Start them; worker i uses GPU i modulo ``gpus`` if there are any, and may hold ``memory`` bytes."""
        self._folder = tempfile.TemporaryDirectory(prefix="properties-")
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(variable, "1")  # one core a worker
        path = Path(self._folder.name)
        self.workers = [
            Worker(path, number, subject, device, number % gpus if gpus else None, memory=memory)
            for number in range(size)
        ]

    def idle(self) -> list[Worker]:
        """Workers without a task."""
        return [worker for worker in self.workers if worker.task is None]

    def busy(self) -> list[Worker]:
        """Workers with a task."""
        return [worker for worker in self.workers if worker.task is not None]

    def wait(self, seconds: float) -> None:
        """Sleep until a worker has something to say, at most this long."""
        handles: Sequence[Connection] = [worker.connection for worker in self.busy()]
        if handles:
            wait(handles, seconds)
        else:
            time.sleep(seconds)

    def stop(self) -> None:
        """Kill all workers."""
        for worker in self.workers:
            worker.stop()
        self._folder.cleanup()


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _held(pid: int | None) -> int:
    """Bytes of memory that a process has touched and still holds; 0 if nobody says."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _waited(pid: int | None) -> float:
    """Seconds for which a process was ready to run and had no processor; 0 if nobody says."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            return f"the process was killed by {signal.Signals(-exitcode).name}"
        except ValueError:
            return f"the process was killed by signal {-exitcode}"
    if exitcode == CONTEXT_LOST_STATUS:
        return "the kernel destroyed the CUDA context"
    return f"the process exited with status {exitcode}"
