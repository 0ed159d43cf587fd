"""Time the verification suite itself: cases a second, and where the time goes.

    python benchmarks/benchmark_suite.py [--device auto|cpu|cuda] [--law NAME] [--seconds S] [--workers 1,2]
                                         [--seed N] [--json FILE]

First all laws in this process, twice with different cases: the first pass also compiles kernels and fills caches, the
second shows the suite warm, split into drawing, data, kernel, oracle, comparison and the rest. Then ``verify`` with
each number of workers, from the first case to the last; on a GPU twice with the same seed, since other cases need other
kernels: the second time those are on disk. Exit status: 0; 1 if a law failed; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.report import Results, Row
    from properties.laws import Law

if __name__ == "__main__":  # from a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

UNLIMITED = 1_000_000
SHARE_IN_PROCESS = 0.5
SUITE = "suite"


@dataclass(frozen=True)
class Pass:
    """All laws once.

    Attributes:
        cases: tried.
        seconds: by section.
        failed: names of laws that failed.
    """

    cases: int
    seconds: dict[str, float]
    failed: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Cases a second."""
        return self.cases / max(sum(self.seconds.values()), 1e-9)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmark_suite.py", description=__doc__.split("\n")[0])
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--law", metavar="NAME", help="only laws whose name contains this")
    made.add_argument("--seconds", type=_seconds, default=120.0, metavar="S", help="of all together; default 120")
    made.add_argument("--workers", type=_counts, default=(1, 2), metavar="N,N", help="default 1,2; 0 for none")
    made.add_argument("--seed", type=int, default=0, metavar="N")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def _counts(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if any(value < 0 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers of workers, got {text}")
    return tuple(value for value in values if value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit status."""
    made = parser()
    options = made.parse_args(arguments)
    from properties import device as devices

    try:
        device = devices.choose(options.device)  # before anything imports Triton
        laws = _laws(device, options.law)
    except ValueError as error:
        made.error(str(error))
    except devices.DeviceError as error:
        made.error(str(error))
    from benchmarks import machine, report

    header = machine.describe(device) | {"device": devices.describe(device), "arguments": {"seconds": options.seconds}}
    results = report.Results(header)
    print(f"{header['device']}\ncommit {header['commit']}, {header['date']}; {len(laws)} laws", flush=True)
    rounds = ("other cases", "the same again") if device == "cuda" else ("other cases",)
    parts = len(options.workers) * len(rounds)
    in_process = options.seconds * (SHARE_IN_PROCESS if parts else 1.0)
    failed: set[str] = set()
    for name, seed in (("first pass, in this process", options.seed), ("warm, in this process", options.seed + 1)):
        found = explore_all(laws, in_process / 2, seed)
        failed |= set(found.failed)
        results.rows.append(row_of(name, found))
    rates: dict[int, float] = {}
    for workers, which in itertools.product(options.workers, rounds):
        cases, seconds, broken = with_workers(options, device, workers, (options.seconds - in_process) / parts)
        failed |= broken
        rates[workers] = cases / max(seconds, 1e-9)
        results.rows.append(_rated(f"verify, {workers} workers, {which}", cases, seconds))
        if workers > 1 and 1 in rates and which == rounds[-1]:
            results.rows[-1].notes["speed_up"] = rates[workers] / rates[1]
    _show(results)
    if options.json is not None:
        results.save(options.json)
    if failed:
        print(f"laws that failed, so that their rates mean nothing: {', '.join(sorted(failed))}")
    if len(results.rows) > 2 and device == "cpu":
        print("Rates of the interpreter depend on what else runs on the machine's cores.")
    return 1 if failed else 0


def _laws(device: str, wanted: str | None) -> dict[str, Law]:
    import os

    from properties import laws
    from properties.strategies import sizes

    if device == "cuda":
        os.environ.setdefault(sizes.VARIABLE, "large")
    import torch

    torch.set_num_threads(1)  # as in a worker
    found = laws.discover()
    return {name: found[name] for name in laws.select_names(list(found), wanted)}


def explore_all(laws: dict[str, Law], seconds: float, seed: int, max_examples: int = UNLIMITED) -> Pass:
    """Run every law for an equal share of the time, watched."""
    from benchmarks.section_times import Stopwatch, watching
    from properties.exploring import Assignment, explore

    cases, failed = 0, []
    total: dict[str, float] = {}
    for name, law in laws.items():
        stopwatch = Stopwatch("drawing")
        with watching(stopwatch):
            watched = dataclasses.replace(law, check=stopwatch.around("rest", law.check))
            law_seed = zlib.crc32(f"{seed} {name}".encode())
            work = Assignment(name, law_seed, max_examples, seconds / len(laws), shrink_seconds=1.0)
            outcome = explore(watched, work)
            for section, spent in stopwatch.read().items():
                total[section] = total.get(section, 0.0) + spent
        cases += outcome.tally.cases
        if outcome.failure is not None:
            failed.append(name)
    return Pass(cases, total, tuple(failed))


def row_of(name: str, found: Pass) -> Row:
    """A pass as a row: microseconds a case, and the share of each section."""
    from benchmarks.section_times import SECTIONS

    total = max(sum(found.seconds.values()), 1e-9)
    row = _rated(name, found.cases, total)
    row.notes["shares"] = {section: found.seconds.get(section, 0.0) / total for section in SECTIONS}
    return row


def _rated(name: str, cases: int, seconds: float) -> Row:
    from benchmarks.report import Row

    us = seconds / cases * 1e6 if cases else None
    notes: dict[str, Any] = {"cases": cases, "cases_per_second": cases / max(seconds, 1e-9)}
    return Row(SUITE, name, us, 0, None, {}, notes=notes)


def with_workers(options: argparse.Namespace, device: str, workers: int, seconds: float) -> tuple[int, float, set[str]]:
    """Cases, seconds from the workers being ready to the end, and the laws that failed, of one ``verify``."""
    from properties.progress import Progress
    from properties.verify import Options, Verification

    class Times(Progress):
        """Says nothing; notes when the workers were ready and when they were done."""

        ready = done = 0.0

        def say(self, text: str) -> None:
            del text
            self.ready = self.ready or time.monotonic()

        def close(self) -> None:
            super().close()
            self.done = self.done or time.monotonic()

    with tempfile.TemporaryDirectory() as folder:
        times = Times()
        chosen = Options(
            law=options.law,
            seconds=seconds,
            seed=options.seed + 2,
            device=device,
            workers=workers,
            gpus=1 if device == "cuda" else 0,
            regressions=Path(folder),
            candidates=Path(folder),
            database=None,
        )
        run = Verification(chosen, times)
        run.run()
    cases = sum(result.tally.cases for result in run.results.values())
    broken = {name for name, result in run.results.items() if result.failure is not None}
    return cases, times.done - times.ready, broken


def _show(results: Results) -> None:
    from benchmarks import report
    from benchmarks.section_times import SECTIONS

    titles = ["", "cases", "cases/s", "us a case", *SECTIONS, "remarks"]
    cells = []
    for row in results.rows:
        shares = row.notes.get("shares", {})
        speed_up = row.notes.get("speed_up")
        cells.append(
            [
                row.case,
                str(row.notes["cases"]),
                f"{row.notes['cases_per_second']:.1f}",
                "-" if row.us is None else f"{row.us:.0f}",
                *(f"{100 * shares[name]:.0f} %" if shares else "-" for name in SECTIONS),
                "" if speed_up is None else f"{speed_up:.2f} x one worker",
            ]
        )
    report.show(titles, cells, "the verification suite")


if __name__ == "__main__":
    sys.exit(main())
