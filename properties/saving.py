"""Store a failing case: a small JSON file that replays it, and a script that shows it without this project."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from properties import device as devices
from properties import schedule, script, subjects
from properties.case_file import CaseFile, Fact
from properties.exploring import Failure

CANDIDATES = Path("fixtures/candidates")


def save(failure: Failure, folder: Path = CANDIDATES) -> str:
    """Write both files; the block of text that a person reads, the replay command in its last lines."""
    subject = subjects.active()
    stored = CaseFile(
        law=failure.law,
        subject=subject.spec,
        case=failure.case,
        digest=schedule.digest(failure.case),
        provenance=_provenance(failure),
    )
    name = hashlib.sha256(f"{failure.law} {failure.case.to_json()}".encode()).hexdigest()[:6]
    folder.mkdir(parents=True, exist_ok=True)
    record, program = folder / f"{name}.json", folder / f"{name}.py"
    record.write_text(stored.dumps())
    program.write_text(script.write(failure, subject, record.name))
    return block(failure, subject.spec, record, program)


def block(failure: Failure, spec: str, record: Path, program: Path | None = None) -> str:
    """The text of a failure, ending in what to run."""
    lines = [failure.report]
    if failure.sibling_laws:
        lines.append(f"  also breaks: {', '.join(failure.sibling_laws)}")
    option = "" if spec == subjects.DEFAULT else f" --subject {spec}"
    lines.append(f"  replay: python -m properties replay {record}{option}")
    if program is not None:
        lines.append(f"  script: python {program}")
    return "\n".join(lines)


def _provenance(failure: Failure) -> dict[str, Fact]:
    facts: dict[str, Fact] = {"kind": failure.kind, **devices.versions()}
    facts["device"] = devices.describe(devices.current()).split(";")[0][:200]
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return facts
    return facts | {"commit": done.stdout.strip()[:200]}
