"""The process that runs cases. A kernel may kill it or hang in it: its journal says with what."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from properties.case import Case
from properties.exploring import Assignment, Failure


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know before it imports Triton.

    Attributes:
        subject: specification of the kernel under test.
        device: as asked for.
        journal: path of the worker's journal.
        gpu: index of the GPU it uses among the visible ones; None for all.
    """

    subject: str
    device: str
    journal: str
    gpu: int | None = None


@dataclass(frozen=True)
class Ready:
    """A worker's first message: where it runs, and the laws it found. ``error`` if it cannot work."""

    device: str = ""
    description: str = ""
    laws: dict[str, str] = field(default_factory=dict)
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


Task = Assignment | Check | Save


def main(connection: Connection, setup: Setup) -> None:
    """Serve tasks until the parent goes away."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if setup.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else None
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[setup.gpu % len(gpus)] if gpus else str(setup.gpu)
    try:
        _serve(connection, setup)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _serve(connection: Connection, setup: Setup) -> None:
    from properties import device, exploring, laws, saving, subjects
    from properties.journal import Journal
    from properties.strategies import sizes

    try:
        chosen = device.choose(setup.device)
        import torch

        torch.set_num_threads(1)
        subject = subjects.activate(setup.subject)
        if chosen == "cuda" and not subject.slow:
            os.environ.setdefault(sizes.VARIABLE, "large")
        found = laws.discover()
    except (device.DeviceError, subjects.SubjectError, ValueError) as error:
        connection.send(Ready(error=str(error)))
        return
    journal = Journal(Path(setup.journal))
    sentences = {name: law.sentence for name, law in found.items()}
    connection.send(Ready(chosen, device.describe(chosen), sentences))
    while True:
        task: Task = connection.recv()
        match task:
            case exploring.Assignment():
                connection.send(exploring.explore(found[task.law], task, journal))
            case Check():
                connection.send(exploring.check(found[task.law], task.case, journal))
            case Save():
                connection.send(saving.save(task.failure, Path(task.folder)))
