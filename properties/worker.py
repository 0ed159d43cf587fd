"""The process that runs cases. A kernel may kill it or hang in it: its journal says with what."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from properties.case import Case
from properties.exploring import Assignment, Failure
from properties.journal import Journal


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know before it imports Triton.

    Attributes:
        subject: specification of the kernel under test.
        device: as asked for.
        journal: path of the worker's journal.
        gpu: index of the GPU it uses among the visible ones; None for all.
        first_on_path: folder whose modules win over those of the checkout; "" for none.
    """

    subject: str
    device: str
    journal: str
    gpu: int | None = None
    first_on_path: str = ""


@dataclass(frozen=True)
class Ready:
    """A worker's first message: where it runs, and the laws it found. ``error`` if it cannot work.

    Attributes:
        laws: sentence of each law that the subject owes.
        not_offered: what the subject lacks for each of the others.
        has_lse: whether it returns log-sum-exps.
        versions: of everything that can change a result.
        is_slow: whether a case takes seconds, as when a shape is compiled.
    """

    device: str = ""
    description: str = ""
    laws: dict[str, str] = field(default_factory=dict)
    not_offered: dict[str, str] = field(default_factory=dict)
    has_lse: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    is_slow: bool = False
    error: str = ""


@dataclass(frozen=True)
class Check:
    """Run one law on one case; answered by a Failure or None."""

    law: str
    case: Case


@dataclass(frozen=True)
class Save:
    """Write a failure's files; answered by the text to print."""

    failure: Failure
    folder: str


@dataclass(frozen=True)
class Call:
    """Call ``function`` ("module:name") without arguments; answered by what it returns."""

    function: str


@dataclass(frozen=True)
class Measure:
    """Run a problem of the league; answered by a Measured."""

    case: Case


Task = Assignment | Check | Save | Call | Measure


def main(connection: Connection, setup: Setup) -> None:
    """Serve tasks until the parent goes away."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If memory runs out faster than the parent looks, the system is to end the worker and nobody else.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if setup.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else None
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[setup.gpu % len(gpus)] if gpus else str(setup.gpu)
    if setup.first_on_path:
        sys.path.insert(0, setup.first_on_path)
    try:
        _serve(connection, setup)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _serve(connection: Connection, setup: Setup) -> None:
    from properties import device, exploring, laws, saving, subjects
    from properties.strategies import sizes

    try:
        chosen = device.choose(setup.device)
        import torch

        torch.set_num_threads(1)
        subject = subjects.activate(setup.subject)
        if chosen == "cuda" and not subject.slow:
            os.environ.setdefault(sizes.VARIABLE, "large")
        found, not_offered = laws.owed(laws.discover(), lambda need: subject.meets(need, chosen))
    except (device.DeviceError, subjects.SubjectError, ValueError) as error:
        connection.send(Ready(error=str(error)))
        return
    journal = Journal(Path(setup.journal))
    sentences = {name: law.sentence for name, law in found.items()}
    described, versions = device.describe(chosen, subject.packages), device.versions(subject.packages)
    connection.send(Ready(chosen, described, sentences, not_offered, subject.capabilities.lse, versions, subject.slow))
    while True:
        task: Task = connection.recv()
        match task:
            case exploring.Assignment():
                connection.send(exploring.explore(found[task.law], task, journal))
            case Check():
                connection.send(exploring.check(found[task.law], task.case, journal))
            case Save():
                connection.send(saving.save(task.failure, Path(task.folder)))
            case Call():
                connection.send(_call(task.function, journal))
            case Measure():
                connection.send(_measure(task.case, journal))


def _measure(case: Case, journal: Journal) -> object:
    from properties.league.measuring import measure

    journal.begin("league", case.to_json())
    try:
        return measure(case)
    finally:
        journal.end()


def _call(function: str, journal: Journal) -> object:
    module, _, name = function.partition(":")
    journal.begin(function, "")
    try:
        return getattr(importlib.import_module(module), name)()
    finally:
        journal.end()
