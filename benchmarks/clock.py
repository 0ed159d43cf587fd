"""A budget of seconds; without torch, so that it counts from before torch is imported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Clock:
    """A budget of seconds. Work that no longer fits is not begun.

    Args:
        seconds: of the whole run; None for no limit.
        now: a monotonic clock, for tests.
    """

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self._seconds = seconds

    def spent(self) -> float:
        """Seconds since the start."""
        return self._now() - self._began

    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return math.inf if self._seconds is None else self._seconds - self.spent()

    def fits(self, estimate: float) -> bool:
        """Whether work of this many seconds would end in time."""
        return self.left() >= estimate
