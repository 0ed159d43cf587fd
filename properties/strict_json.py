"""JSON from strangers: size-limited, without duplicate keys, NaN or deep nesting, one line per refusal."""

from __future__ import annotations

import json
from typing import NoReturn

from properties.requirements import CaseError

MAX_BYTES = 1_000_000
MAX_DEPTH = 12


def parse(text: str | bytes) -> object:
    """Parse one JSON document.

    Args:
        text: the document; bytes must be UTF-8. At most MAX_BYTES bytes, nested at most MAX_DEPTH deep.

    Raises:
        CaseError: the document is refused; nothing of it has been evaluated.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > MAX_BYTES:
        raise CaseError(f"the text must have at most {MAX_BYTES} bytes, got {len(raw)}")
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CaseError(f"the text must be UTF-8, got byte {raw[error.start]:#04x} at {error.start}") from None
    _refuse_deep_nesting(decoded)
    try:
        return json.loads(
            decoded,
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_short_int,
        )
    except json.JSONDecodeError as error:
        raise CaseError(
            f"the text must be JSON, got {error.msg.lower()} at line {error.lineno} column {error.colno}"
        ) from None


def _refuse_deep_nesting(text: str) -> None:
    """Bound the nesting before the parser recurses: its own limit is the interpreter's stack."""
    depth = 0
    in_string = False
    escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise CaseError(f"the text must be nested at most {MAX_DEPTH} deep, got more")
        elif character in "]}":
            depth -= 1


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise CaseError(f"each key must be given once, got {name[:40]!r} twice")
        fields[name] = value
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise CaseError(f"numbers must be finite, got {name}")


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise CaseError(f"integers must have at most 20 characters, got {len(digits)}")
    return int(digits)
