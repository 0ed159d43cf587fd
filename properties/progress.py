"""What a run shows: a live line while it works, plain lines where there is no terminal, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

PLAIN_EVERY = 10.0


@dataclass(frozen=True)
class Line:
    """One row of the final table.

    Attributes:
        law: its name.
        cases: tried.
        worst_out, worst_lse: largest error over budget; None if nothing was compared with the references.
        seconds: of worker time.
        verdict: "holds", "FAILS", "not run" ...
    """

    law: str
    cases: int
    worst_out: float | None
    worst_lse: float | None
    seconds: float
    verdict: str


@dataclass(frozen=True)
class Moment:
    """The state of a run."""

    cases: int
    seconds: float
    total_seconds: float | None
    laws: tuple[str, ...]
    worst: float
    failing: int

    def __str__(self) -> str:
        """One line of text."""
        rate = self.cases / self.seconds if self.seconds > 0 else 0.0
        clock = f"{self.seconds:.0f} s" + (f" of {self.total_seconds:.0f} s" if self.total_seconds else "")
        parts = [f"{self.cases} cases", f"{rate:.0f}/s", clock, f"worst error {self.worst:.2f} x budget"]
        parts += [f"{self.failing} failing"] * (self.failing > 0)
        return ", ".join([*parts, " | ".join(self.laws)])


class Progress:
    """Shows moments; text printed through ``say`` does not tear the live line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Use rich on a terminal if it is installed, a plain rewritten line otherwise."""
        self.stream = sys.stdout if stream is None else stream
        self.terminal = self.stream.isatty()
        self._last_plain = time.monotonic()
        self._live: Any = None
        if self.terminal:
            try:
                from rich.console import Console
                from rich.live import Live
            except ImportError:
                pass
            else:
                self._live = Live(console=Console(file=self.stream), refresh_per_second=5, transient=True)
                self._live.start()

    def show(self, moment: Moment) -> None:
        """Update the line; without a terminal print one now and then."""
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(str(moment), overflow="ellipsis", no_wrap=True))
        elif self.terminal:
            self.stream.write(f"\r\x1b[K{str(moment)[:110]}")
            self.stream.flush()
        elif time.monotonic() - self._last_plain >= PLAIN_EVERY:
            self._last_plain = time.monotonic()
            self.say(str(moment))

    def say(self, text: str) -> None:
        """Print lines that stay."""
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(text), soft_wrap=True)
            return
        self.stream.write(("\r\x1b[K" if self.terminal else "") + text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Remove the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _share(worst: float | None) -> str:
    return "-" if worst is None else f"{worst:.3f}"


def table(lines: Sequence[Line]) -> str:
    """The final table, in plain text."""
    header = ("law", "cases", "error/budget out", "lse", "time", "verdict")
    body = [
        (
            line.law.replace("_", " "),
            str(line.cases),
            _share(line.worst_out),
            _share(line.worst_lse),
            f"{line.seconds:.1f} s",
            line.verdict,
        )
        for line in lines
    ]
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]

    def line_of(row: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(width) if i in (0, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line_of(header), "  ".join("-" * width for width in widths), *map(line_of, body)])
