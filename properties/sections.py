"""Sections of a document that a command writes, between two comments."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end of what is written -->"


def begin(command: str) -> str:
    """The comment that opens the section of a command."""
    return f"<!-- written by: {command} -->"


def read(path: Path, command: str) -> str:
    """What a section holds.

    Raises:
        ValueError: the document has no such section.
    """
    return _parts(path, command)[1].strip()


def write(path: Path, command: str, text: str) -> None:
    """Replace what a section holds.

    Raises:
        ValueError: the document has no such section.
    """
    before, _, after = _parts(path, command)
    path.write_text(f"{before}{begin(command)}\n\n{text.strip()}\n\n{END}{after}")


def _parts(path: Path, command: str) -> tuple[str, str, str]:
    before, _, rest = path.read_text().partition(begin(command))
    inside, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path} must have a section from {begin(command)} to {END}")
    return before, inside, after
