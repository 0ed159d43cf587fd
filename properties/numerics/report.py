"""Put a generated block into docs/numerics.md, between its markers, so that no table is edited by hand."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def publish(name: str, text: str, page: Path = DOCS / "numerics.md") -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
        ValueError: the page has no such block.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = page.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise ValueError(f"{page.name} must have one block between {begin!r} and {end!r}")
    page.write_text(pattern.sub(lambda _: f"{begin}\n\n{text.strip()}\n\n{end}", old))
