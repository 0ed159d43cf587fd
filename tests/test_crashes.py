"""A kernel that dies or hangs is a failing case like any other: found, reduced, stored, and the run goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from properties import pool, verify
from properties.case import Case, Row
from properties.journal import Journal
from properties.progress import Progress
from properties.worker import Ready
from tests.command_line import properties

DEATHS = [
    ("aborts", "crash", "the process was killed by SIGABRT"),
    ("reads_far_outside", "crash", "the process was killed by SIGSEGV"),
    ("hangs", "hang", "did not return within 3 s"),
]
if torch.cuda.is_available():
    DEATHS.append(("loses_the_context", "crash", "the kernel destroyed the CUDA context"))


@pytest.mark.parametrize(("kernel", "kind", "words"), DEATHS)
def test_death_is_a_verdict_with_a_small_case(kernel: str, kind: str, words: str, tmp_path: Path) -> None:
    seconds = 30 if kind == "hang" else 60
    done = properties(
        "verify",
        *("--subject", f"tests.faulty_subjects:{kernel}", "--law", "append_stores"),
        *("--seconds", seconds, "--case-seconds", 3, "--seed", 2, "-n", 1, "--json", "result.json"),
        folder=tmp_path,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stdout
    assert "  replay: python -m properties replay fixtures/candidates/" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    failure = json.loads((tmp_path / "result.json").read_text())["laws"][0]["failure"]
    assert failure["kind"] == kind
    rows = failure["case"]["rows"]
    # A hang costs seconds a trial, so its reduction may end early; a crash is cheap enough to be minimal.
    kv_len = max(row["cached"] + sum(row["new"]) for row in rows)
    assert kv_len == 17 if kind == "crash" else kv_len >= 17
    assert failure["case"]["values"] == "zeros"


@pytest.mark.parametrize(
    ("asked", "is_slow", "allowed"), [(None, False, 30.0), (None, True, 300.0), (5.0, True, 5.0), (90.0, False, 90.0)]
)
def test_a_kernel_that_is_compiled_for_each_shape_may_take_longer(
    asked: float | None, is_slow: bool, allowed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = MagicMock(workers=[MagicMock()])
    workers.workers[0].ready.return_value = Ready(is_slow=is_slow)
    workers.idle.return_value = workers.busy.return_value = []
    monkeypatch.setattr(verify, "Pool", MagicMock(return_value=workers))
    verification = verify.Verification(verify.Options(case_seconds=asked, regressions=tmp_path), Progress())

    assert verification.run() == verify.EXIT_HOLDS
    assert verification.case_seconds == allowed


@pytest.mark.parametrize(("waited", "is_hang"), [(0.0, True), (55.0, True), (75.0, False)])
@pytest.mark.parametrize("unseen", [0.0, 40.0])
def test_time_without_a_processor_is_no_time_of_the_case(
    unseen: float, waited: float, is_hang: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of low priority on a busy machine once stood still for 30 s, and once while nobody looked: no hangs."""
    clock, queue = [unseen], [5.0]
    monkeypatch.setattr(pool, "_waited", lambda _: queue[0])
    monkeypatch.setattr(pool.Worker, "_start", lambda self: setattr(self, "process", MagicMock(pid=1)))
    monkeypatch.setattr(pool, "_held", lambda _: 0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    worker = pool.Worker(tmp_path, 0, "flashcore", "cpu")
    worker.connection = MagicMock()
    worker.connection.poll.return_value = False
    entry = MagicMock(running=True, began=0.0, cases=1, law="a_law", case_json="")
    monkeypatch.setattr(worker, "entry", lambda: entry)

    assert worker.collect(30.0) is None
    clock[0], queue[0] = unseen + 100.0, 5.0 + waited

    death = worker.collect(30.0)

    assert (death is not None) is is_hang
    assert not is_hang or death.kind == "hang"


def test_a_process_that_is_not_there_has_not_waited() -> None:
    assert pool._waited(None) == 0.0


def test_taking_memory_without_end_is_a_verdict_too(tmp_path: Path) -> None:
    done = properties(
        "verify",
        *("--subject", "tests.faulty_subjects:hoards", "--law", "append_stores", "--worker-gib", 1),
        *("--seconds", 8, "--seed", 2, "-n", 1, "--json", "result.json"),
        folder=tmp_path,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    assert "the kernel took too much memory\n  held " in done.stdout
    assert " GiB, more than the 1.0 allowed; if it needs that much, raise --worker-gib\n  case: " in done.stdout
    failure = json.loads((tmp_path / "result.json").read_text())["laws"][0]["failure"]
    assert failure["kind"] == "memory"
    assert max(row["cached"] + sum(row["new"]) for row in failure["case"]["rows"]) >= 17


def test_the_journal_tells_another_process_what_is_running(tmp_path: Path) -> None:
    writer, reader = Journal(tmp_path / "journal"), Journal(tmp_path / "journal")
    case = Case(rows=(Row(0, (17,)),))
    assert not reader.read().running

    writer.begin("law", case.to_json(), 0.5, 0.25)
    entry = reader.read()
    assert (entry.running, entry.cases, entry.law) == (True, 1, "law")
    assert (entry.worst_out, entry.worst_lse) == (0.5, 0.25)
    assert Case.from_json(entry.case_json) == case
    assert 0 <= time.monotonic() - entry.began < 60

    writer.end()
    assert not reader.read().running
    for journal in (writer, reader):
        journal.close()


def test_a_case_too_large_for_the_journal_is_not_half_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.begin("law", "x" * (1 << 21))

    assert journal.read().case_json == ""
    assert journal.read().running
    journal.close()
