"""What was seen while a law ran: cases, the worst use of the budget, the regions of the input space reached.

Cheap enough to be always on: a few additions to numbers a case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from properties.assertions import Utilisation
from references.noise import NoisePool


@dataclass
class AlarmCount:
    """Cases the alarm looked at: how many, how many raised it, and again on fresh data.

    No error was above ``worst`` times the alarm; above 1 it is the largest one.
    """

    judged: int = 0
    raised: int = 0
    came_back: int = 0
    worst: float = 0.0

    def __iadd__(self, other: AlarmCount) -> AlarmCount:
        """Add other cases."""
        self.judged += other.judged
        self.raised += other.raised
        self.came_back += other.came_back
        self.worst = max(self.worst, other.worst)
        return self


@dataclass
class Tally:
    """The sums of one law.

    Attributes:
        cases: cases tried.
        calls: calls of the kernel compared with the reference.
        not_offered: cases that ask for what the subject does not offer, by what that is; they prove nothing.
        worst: largest error over budget seen.
        regions: how many cases reached each named region.
        noise: errors over their predicted standard deviation, pooled by format and arithmetic.
        alarm: what the alarm saw.
    """

    cases: int = 0
    calls: int = 0
    not_offered: Counter[str] = field(default_factory=Counter)
    worst: Utilisation = field(default_factory=Utilisation)
    regions: Counter[str] = field(default_factory=Counter)
    noise: dict[str, NoisePool] = field(default_factory=dict)
    alarm: AlarmCount = field(default_factory=AlarmCount)

    def __iadd__(self, other: Tally) -> Tally:
        """Add the sums of another run of the same law."""
        self.cases += other.cases
        self.calls += other.calls
        self.not_offered.update(other.not_offered)
        self.worst |= other.worst
        self.regions.update(other.regions)
        for name, pool in other.noise.items():
            self.noise.setdefault(name, NoisePool()).merge(pool)
        self.alarm += other.alarm
        return self


class Recorder:
    """Where runs report to. There is one, ``recorder``; whoever runs a law gives it a fresh tally."""

    def __init__(self) -> None:
        """Start with a tally that nobody reads, so that reporting always works."""
        self.tally = Tally()

    def start(self) -> Tally:
        """Begin a law: everything from now on is added to the tally returned."""
        self.tally = Tally()
        return self.tally

    def compared(self, used: Utilisation) -> None:
        """One call was within its budget."""
        self.tally.calls += 1
        self.tally.worst |= used

    def pooled(self, name: str, pool: NoisePool) -> None:
        """The errors of one case, as noise."""
        self.tally.noise.setdefault(name, NoisePool()).merge(pool)

    def reached(self, regions: Iterable[str]) -> None:
        """One case reached these regions."""
        self.tally.regions.update(set(regions))


recorder = Recorder()
