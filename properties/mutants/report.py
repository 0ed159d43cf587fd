"""The score as a table, in text and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from properties.mutants.baselines import BASELINES
from properties.mutants.mutant import Mutant
from properties.mutants.trial import KILLED, SURVIVED, UNSOUND, Verdict
from properties.reduction import size


@dataclass(frozen=True)
class Score:
    """What became of all mutants.

    Attributes:
        verdicts: of those that ran.
        absent: those that cannot show on this machine.
        description: device and versions.
        profile: how hard the laws tried.
        num_laws: how many there are.
        seconds: that the verdicts took, summed.
        baselines: which baselines fail on the shipped source.
        pending: mutants that could run here and have not yet.
        laws_digest: of the laws as they are.
    """

    verdicts: tuple[Verdict, ...]
    absent: tuple[Mutant, ...]
    description: str
    profile: str
    num_laws: int
    seconds: float
    baselines: dict[str, bool] = field(default_factory=dict)
    pending: tuple[Mutant, ...] = ()
    laws_digest: str = ""

    @property
    def faults(self) -> list[Verdict]:
        """The planted faults that ran."""
        return [v for v in self.verdicts if not v.mutant.neutral]

    @property
    def survivors(self) -> list[Verdict]:
        """Faults that no law saw, and those whose case says nothing."""
        return [v for v in self.faults if v.outcome != KILLED]

    @property
    def false_alarms(self) -> list[Verdict]:
        """Neutral changes that a law objected to."""
        return [v for v in self.verdicts if v.mutant.neutral and v.outcome != SURVIVED]

    @property
    def outdated(self) -> list[Verdict]:
        """Those of laws that have changed since."""
        return [v for v in self.verdicts if v.laws_digest != self.laws_digest]

    @property
    def perfect(self) -> bool:
        """Every fault killed, every neutral change let through."""
        return not self.survivors and not self.false_alarms and not self.pending

    @property
    def median_seconds(self) -> float:
        """Until the kill."""
        times = [v.seconds for v in self.faults if v.outcome == KILLED]
        return statistics.median(times) if times else 0.0


HEADER = ("id", "class", "killed by", "cases", "seconds", "tokens", *BASELINES)


def table(score: Score) -> str:
    """Everything, survivors first."""
    rows = [HEADER, *(_cells(v) for v in _sorted(score.verdicts))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [f"{m.id}: not run here: {m.needs_gpu}" for m in score.absent]
    lines += ["", *_by_class(score), "", *_summary(score)]
    return "\n".join(lines)


def markdown(score: Score, date: str) -> str:
    """The document ``docs/mutation-score.md``."""
    lines = [
        "# Mutation score",
        "",
        f"Written by `python -m properties mutants --profile {score.profile} --resume --json FILE --markdown "
        f"docs/mutation-score.md` on {date}; {score.description}. Verdicts of an earlier run were taken from FILE if "
        "neither the mutated text nor the laws had changed. Seconds are those of the wall clock, whatever else the "
        "machine did.",
        "",
        "Each mutant is a small fault planted in a copy of the kernels or of their Python wrapper "
        "(`properties/mutants/`). It is killed when a law fails on some generated case that the shipped source passes. "
        "The last columns say whether two test suites of the usual kind, written for this comparison "
        "(`properties/mutants/baselines.py`), would have failed: four fixed tests at 1e-3, and a dozen fixed shapes at "
        "1.5e-2, all on N(0, 1).",
        "",
        *(f"* {line}" for line in _summary(score)),
        "",
        "## By class",
        "",
        *_markdown_table(("class", "killed", *BASELINES), [row.split("|") for row in _class_rows(score)]),
        "",
        "## The ten smallest minimal cases",
        "",
        *_markdown_table(
            ("id", "change", "minimal case", "killed by"),
            [(v.mutant.id, v.mutant.change, v.summary, v.laws[0].replace("_", " ")) for v in _smallest(score)],
        ),
        "",
        "## Mutants",
        "",
        "Survivors first. *tokens*: of the minimal case. *also*: laws that fail on it, too.",
        "",
        *_markdown_table(
            ("id", "class", "change", "killed by", "also", "cases", "s", "tokens", "minimal case", *BASELINES),
            [_markdown_cells(v) for v in _sorted(score.verdicts)],
        ),
        "",
    ]
    if score.absent:
        lines += ["## Not run here", "", *(f"* {m.id} {m.change}: {m.needs_gpu}." for m in score.absent), ""]
    return "\n".join(lines)


def _smallest(score: Score) -> list[Verdict]:
    """The ten kills with the smallest cases, by the order in which cases are reduced."""
    killed = [v for v in score.faults if v.outcome == KILLED and v.case is not None]
    return sorted(killed, key=lambda v: (size(v.case), v.mutant.id) if v.case is not None else ())[:10]


def _sorted(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Survivors and false alarms, then the killed, then neutral survivors; each by class."""

    def rank(verdict: Verdict) -> tuple[int, str]:
        wrong = (verdict.outcome == KILLED) == verdict.mutant.neutral or verdict.outcome == UNSOUND
        return (0 if wrong else 2 if verdict.mutant.neutral else 1), verdict.mutant.category

    return sorted(verdicts, key=rank)


def _killer(verdict: Verdict) -> str:
    if verdict.outcome == KILLED:
        more = f" (+{len(verdict.laws) - 1})" if len(verdict.laws) > 1 else ""
        return verdict.laws[0].replace("_", " ") + more
    if verdict.outcome == UNSOUND:
        return "UNSOUND: the shipped source fails, too"
    return "survives, as it must" if verdict.mutant.neutral else "SURVIVES"


def _baseline_cells(verdict: Verdict) -> list[str]:
    return [{True: "killed", False: "missed", None: ""}[verdict.baselines.get(name)] for name in BASELINES]


def _cells(verdict: Verdict) -> tuple[str, ...]:
    tokens = "" if verdict.tokens is None else str(verdict.tokens)
    mutant = verdict.mutant
    numbers = (str(verdict.cases), f"{verdict.seconds:.1f}", tokens)
    return (mutant.id, mutant.category, _killer(verdict)[:70], *numbers, *_baseline_cells(verdict))


def _markdown_cells(verdict: Verdict) -> list[str]:
    name, *numbers = _cells(verdict)[1:6]
    del name
    also = ", ".join(law.replace("_", " ") for law in verdict.laws[1:])
    first = verdict.laws[0].replace("_", " ") if verdict.outcome == KILLED else _killer(verdict)
    mutant = verdict.mutant
    cells = [mutant.id, mutant.category, mutant.change, first, also, *numbers[1:], verdict.summary]
    return [*cells, *_baseline_cells(verdict)]


def _class_rows(score: Score) -> Iterator[str]:
    for category in sorted({v.mutant.category for v in score.faults}):
        of_class = [v for v in score.faults if v.mutant.category == category]
        killed = sum(v.outcome == KILLED for v in of_class)
        counts = [_share(sum(v.baselines.get(name, False) for v in of_class), of_class, name) for name in BASELINES]
        yield "|".join([category, f"{killed} of {len(of_class)}", *counts])


def _share(killed: int, verdicts: Sequence[Verdict], name: str) -> str:
    asked = sum(name in v.baselines for v in verdicts)
    return f"{killed} of {asked}" if asked else "-"


def _by_class(score: Score) -> list[str]:
    rows = [["class", "killed", *BASELINES], *(row.split("|") for row in _class_rows(score))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _summary(score: Score) -> list[str]:
    faults = score.faults
    killed = len(faults) - len(score.survivors)
    lines = []
    if faults:
        share = f"{100 * killed / len(faults):.0f} %"
        lines.append(
            f"{killed} of {len(faults)} planted faults killed ({share}), half of them within "
            f"{score.median_seconds:.1f} s; {score.num_laws} laws, profile {score.profile}, "
            f"{score.seconds:.0f} s of one core in all"
        )
    for name in BASELINES:
        asked = [v for v in faults if name in v.baselines]
        if asked:
            lines.append(f"{sum(v.baselines[name] for v in asked)} of {len(asked)} killed by the {name}")
    neutral = [v for v in score.verdicts if v.mutant.neutral]
    if neutral:
        cases = sum(v.cases for v in neutral)
        lines.append(f"{len(score.false_alarms)} of {len(neutral)} neutral changes killed, in {cases} cases")
    if score.outdated:
        ids = ", ".join(v.mutant.id for v in score.outdated)
        lines.append(f"{len(score.outdated)} verdicts are those of earlier laws: {ids}")
    if score.pending:
        lines.append(f"{len(score.pending)} mutants not run yet: {', '.join(m.id for m in score.pending)}")
    if any(score.baselines.values()):
        failing = ", ".join(name for name, fails in score.baselines.items() if fails)
        lines.append(f"the shipped source fails the {failing}")
    return lines


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
