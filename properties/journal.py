"""A write-ahead journal of cases, in memory shared by a worker and its parent.

A worker writes the case before it runs it. If the kernel kills the worker, or never returns, the parent still
reads which case it was. The file is mapped, so that what is written survives the writer and costs no system call.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

SIZE = 1 << 20
# running, time the case began, cases begun, worst use of the budget (out, lse), bytes of the law's name and the case
_HEADER = struct.Struct("<qdqddqq")


@dataclass(frozen=True)
class Entry:
    """What a worker is doing.

    Attributes:
        running: whether the case has begun and not ended.
        began: ``time.monotonic()`` at its begin.
        cases: cases begun by this worker.
        worst_out, worst_lse: largest error over budget of the law at work.
        law: its name.
        case_json: the case, or "" if it was too large to note.
    """

    running: bool
    began: float
    cases: int
    worst_out: float
    worst_lse: float
    law: str
    case_json: str


class Journal:
    """One worker's journal: written by the worker, read by the parent."""

    def __init__(self, path: Path) -> None:
        """Map the file, creating it if need be."""
        if not path.exists() or path.stat().st_size < SIZE:
            path.write_bytes(bytes(SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SIZE)
        self._cases = self.read().cases

    def begin(self, law: str, case_json: str, worst_out: float = 0.0, worst_lse: float = 0.0) -> None:
        """Note a case that is about to run."""
        self._cases += 1
        name, text = law.encode(), case_json.encode()
        if _HEADER.size + len(name) + len(text) > SIZE:
            text = b""
        at = _HEADER.size
        self._map[at : at + len(name) + len(text)] = name + text
        header = (1, time.monotonic(), self._cases, worst_out, worst_lse, len(name), len(text))
        _HEADER.pack_into(self._map, 0, *header)

    def end(self) -> None:
        """Note that the case came back."""
        struct.pack_into("<q", self._map, 0, 0)

    def read(self) -> Entry:
        """What the worker last noted."""
        running, began, cases, worst_out, worst_lse, name, text = _HEADER.unpack_from(self._map, 0)
        at = _HEADER.size
        law = self._map[at : at + name].decode(errors="replace")
        case_json = self._map[at + name : at + name + text].decode(errors="replace")
        return Entry(bool(running), began, cases, worst_out, worst_lse, law, case_json)

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()
