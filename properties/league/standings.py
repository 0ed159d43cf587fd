"""Run the league, write its results down, and put the results of several runs together."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from properties import subjects
from properties.case import DTYPES, Case
from properties.league import problems
from properties.league.measuring import Measured, Ratios
from properties.pool import Answer, Death, Pool
from properties.strict_json import parse
from properties.verify import CASE_SECONDS, SLOW_CASE_SECONDS
from properties.worker import Measure, Ready

FORMAT = 1
QUANTILES = {"p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
DIGITS = 3


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    subjects: tuple[str, ...]
    cases: int
    seed: int
    device: str
    workers: int
    gpus: int
    case_seconds: float | None


def runnable(device: str) -> list[str]:
    """The subjects that can run in this environment on this device, of those that have a name."""
    kinds = {name: subjects.find(name) for name in subjects.ADAPTERS}
    able = [name for name, kind in kinds.items() if device in kind.capabilities.devices and not kind.missing()]
    return [subjects.DEFAULT, *able]


def compete(options: Options, say: Any = print) -> dict[str, Any]:
    """Run every subject on every problem; the results."""
    drawn = problems.draw(options.cases, options.seed)
    entries = []
    for name in options.subjects:
        ready, outcomes = _measure_all(name, drawn, options)
        found = [_entry(name, ready, dtype, outcomes[dtype]) for dtype in DTYPES]
        entries += [entry for entry in found if entry is not None]
        say(f"{name}: {ready.description}")
    header = {"format": FORMAT, "seed": options.seed, "problems": len(drawn)}
    return {**header, "fingerprint": problems.fingerprint(drawn), "entries": entries}


def _measure_all(name: str, drawn: list[Case], options: Options) -> tuple[Ready, dict[str, list[Measured]]]:
    """What each problem gave in each dtype, in worker processes; a death is a wrong answer."""
    pool = Pool(options.workers, name, options.device, options.gpus)
    outcomes: dict[str, list[Measured]] = {dtype: [Measured()] * len(drawn) for dtype in DTYPES}
    waiting = deque((dtype, i) for dtype in DTYPES for i in range(len(drawn)))
    at_work: dict[int, tuple[str, int]] = {}
    try:
        ready = pool.workers[0].ready()
        patience = options.case_seconds or (SLOW_CASE_SECONDS if ready.is_slow else CASE_SECONDS)
        while waiting or pool.busy():
            for worker in pool.idle():
                if waiting:
                    dtype, i = at_work[worker.number] = waiting.popleft()
                    worker.give(Measure(problems.rounded_to(dtype, drawn[i])))
            pool.wait(0.2)
            for worker in pool.busy():
                answer = worker.collect(patience)
                dtype, i = at_work[worker.number]
                if isinstance(answer, Death):
                    outcomes[dtype][i] = Measured(wrong=f"the kernel died or hung: {answer.how}")
                elif isinstance(answer, Answer):
                    outcomes[dtype][i] = answer.value
    finally:
        pool.stop()
    return ready, outcomes


def _entry(name: str, ready: Ready, dtype: str, outcomes: Sequence[Measured]) -> dict[str, Any] | None:
    """One line of the league; None if the subject took none of the problems."""
    taken = [each for each in outcomes if not each.not_offered]
    if not taken:
        return None
    return {
        "subject": name,
        "dtype": dtype,
        "device": "cpu" if ready.device == "cpu" else ready.description.partition(";")[0],
        "versions": ready.versions,
        "problems": len(taken),
        "not_offered": dict(Counter(each.not_offered for each in outcomes if each.not_offered)),
        "wrong": {str(i): each.wrong for i, each in enumerate(outcomes) if each.wrong},
        "out": quantiles([each.out for each in taken if each.out is not None]),
        "lse": quantiles([each.lse for each in taken if each.lse is not None]),
        "lean": lean([each.lean for each in taken if each.lean is not None and not each.wrong]),
    }


def quantiles(ratios: Sequence[Ratios]) -> dict[str, float | None] | None:
    """Of an element drawn from a problem drawn from these; None in place of what is infinite, and of all if none is."""
    ratios = [each for each in ratios if each.size]
    if not ratios:
        return None
    values = np.concatenate(ratios)
    shares = np.concatenate([np.full(each.size, 1 / (each.size * len(ratios))) for each in ratios])
    order = np.argsort(values)
    values, below = values[order], np.cumsum(shares[order])
    found = {}
    for name, share in QUANTILES.items():
        at = min(int(np.searchsorted(below, share * below[-1] * (1 - 1e-12))), len(values) - 1)
        value = float(values[at])
        found[name] = float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return found


def lean(means: Sequence[float]) -> dict[str, float] | None:
    """Mean over problems, and in how many standard errors it is not 0; None of less than two different ones."""
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    if spread == 0:
        return None
    mean = float(np.mean(means))
    return {"mean": float(f"{mean:.{DIGITS}g}"), "z": float(f"{mean / spread * math.sqrt(len(means)):.{DIGITS}g}")}


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entries of several runs on the same problems.

    Raises:
        ValueError: the problems differ, or a kernel is there twice.
    """
    first = results[0]
    for other in results[1:]:
        for field in ("format", "seed", "problems", "fingerprint"):
            if other[field] != first[field]:
                raise ValueError(f"results must be of the same problems, got {field} {first[field]} and {other[field]}")
    entries = [entry for each in results for entry in each["entries"]]
    twice = [key for key, n in Counter((e["subject"], e["dtype"], e["device"]) for e in entries).items() if n > 1]
    if twice:
        raise ValueError(f"each kernel must be there once, got {', '.join(twice[0])} twice")
    return {**first, "entries": entries}


def read(path: Path) -> dict[str, Any]:
    """Results of an earlier run.

    Raises:
        ValueError: the file holds something else.
    """
    found = parse(path.read_bytes())
    if not isinstance(found, dict) or found.get("format") != FORMAT or "entries" not in found:
        raise ValueError(f"{path} must hold results of the league in format {FORMAT}, got something else")
    return found


def write(results: dict[str, Any], path: Path) -> None:
    """Store results; ``read`` is the inverse."""
    path.write_text(json.dumps(results, indent=1) + "\n")
