"""A case on disk: the problem, the law it broke, and where; data only, never evaluated.

`fixtures/schema/case.schema.json` says the same to other programs; a test keeps the two in step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from properties.case import GENERATOR_VERSION, Case
from properties.requirements import CaseError, require_int, shown
from properties.strict_json import MAX_BYTES, parse

FORMAT_VERSION = 1
MAX_NAME = 200
MAX_STORY = 4000
MAX_PROVENANCE = 64

Fact = str | int | float | bool | None


@dataclass(frozen=True)
class CaseFile:
    """What one file holds.

    Attributes:
        law: the test that failed, "module::function".
        subject: what was under test.
        case: the problem.
        digest: SHA-256 of the case's arrays when it was stored, 64 hex digits.
        story: what the case is about, in words.
        provenance: versions, device, commit: whatever helps, none of it needed to replay.
    """

    law: str
    subject: str
    case: Case
    digest: str
    story: str = ""
    provenance: Mapping[str, Fact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be stored."""
        for name, least, most in (("law", 1, MAX_NAME), ("subject", 1, MAX_NAME), ("story", 0, MAX_STORY)):
            _require_text(name, getattr(self, name), least, most)
        if not isinstance(self.digest, str) or len(self.digest) != 64 or set(self.digest) - set("0123456789abcdef"):
            raise CaseError(f"digest must be 64 lower-case hex digits, got {shown(self.digest)}")
        if not isinstance(self.provenance, Mapping) or len(self.provenance) > MAX_PROVENANCE:
            raise CaseError(f"provenance must be an object of at most {MAX_PROVENANCE} facts")
        for key, fact in self.provenance.items():
            _require_text("provenance key", key, 1, MAX_NAME)
            if isinstance(fact, str):
                _require_text(f"provenance[{key[:40]!r}]", fact, 0, MAX_NAME)
            elif not isinstance(fact, bool | int | float | None):
                raise CaseError(f"provenance[{key[:40]!r}] must be a text, number, flag or null")

    def dumps(self) -> str:
        """Return the file's text; the same record always gives the same bytes."""
        record = {
            "format": FORMAT_VERSION,
            "generator": GENERATOR_VERSION,
            "law": self.law,
            "subject": self.subject,
            "case": dataclasses.asdict(self.case),
            "digest": self.digest,
            "story": self.story,
            "provenance": dict(sorted(self.provenance.items())),
        }
        return json.dumps(record, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def loads(text: str | bytes) -> CaseFile:
        """Read the text of a file; anything but a valid one is a `CaseError` of one line."""
        record = parse(text)
        if not isinstance(record, dict):
            raise CaseError(f"the file must hold an object, got {shown(record)}")
        required = {"format", "generator", "law", "subject", "case", "digest"}
        for problem, keys in (
            ("missing", required - record.keys()),
            ("unknown", record.keys() - required - {"story", "provenance"}),
        ):
            if keys:
                raise CaseError(f"the file must have exactly the known fields, got {problem} {shown(min(keys))}")
        require_int("format", record["format"], FORMAT_VERSION, FORMAT_VERSION)
        # Another generator version would silently replay other numbers than the recorded ones.
        require_int("generator", record["generator"], GENERATOR_VERSION, GENERATOR_VERSION)
        return CaseFile(
            law=record["law"],
            subject=record["subject"],
            case=Case.from_fields(record["case"]),
            digest=record["digest"],
            story=record.get("story", ""),
            provenance=record.get("provenance", {}),
        )

    @staticmethod
    def read(path: Path) -> CaseFile:
        """Read one file, naming it in every refusal; no more than the size limit is ever read."""
        try:
            with path.open("rb") as stream:
                return CaseFile.loads(stream.read(MAX_BYTES + 1))
        except OSError as error:
            raise CaseError(f"{path}: cannot be read: {error.strerror}") from None
        except CaseError as error:
            raise CaseError(f"{path}: {error}") from None


def _require_text(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise CaseError(f"{name} must be a text of {least} to {most} characters, got {shown(value)}")
