"""What a field of a case may hold: each refusal is one line, `<name> must <constraint>, got <value>`."""

from __future__ import annotations

from collections.abc import Sequence


class CaseError(ValueError):
    """A case, or the text of one, that cannot be what it claims to be; the message is one line."""


def require_int(name: str, value: object, low: int, high: int) -> None:
    """Refuse anything but an integer of [low, high]; a bool is none."""
    if type(value) is not int or not low <= value <= high:
        raise CaseError(f"{name} must be an integer in [{low}, {high}], got {shown(value)}")


def require_bool(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if type(value) is not bool:
        raise CaseError(f"{name} must be true or false, got {shown(value)}")


def require_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse anything that is not among the choices."""
    if not isinstance(value, str | int) or value not in choices:
        raise CaseError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")


def require_tuple(name: str, value: object, least: int, most: int, kind: type | None = None) -> None:
    """Refuse anything but a tuple of that length, of records of that kind."""
    if not isinstance(value, tuple) or not least <= len(value) <= most:
        raise CaseError(f"{name} must be a tuple of {least} to {most} items, got {shown(value)}")
    if kind is not None and not all(type(item) is kind for item in value):
        raise CaseError(f"{name} must hold {kind.__name__} records only, got {shown(value)}")


def canonical_hex(text: str) -> str | None:
    """Return the `float.hex()` form of a number's text, or None if it is no number."""
    try:
        return float.fromhex(text).hex()
    except (ValueError, OverflowError):
        return None


def shown(value: object) -> str:
    """Show a value on one line, however large or hostile it is."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
