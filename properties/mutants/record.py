"""Verdicts as JSON: what a run writes after every mutant, and a later run takes over."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from properties.case import Case
from properties.mutants.mutant import ROOT, Mutant, edited
from properties.mutants.trial import KILLED, SURVIVED, Verdict


def digest(mutant: Mutant) -> str:
    """Of the changed files: a verdict on other text says nothing about this mutant."""
    return hashlib.sha256(json.dumps(edited(mutant), sort_keys=True).encode()).hexdigest()[:16]


def laws_digest(root: Path = ROOT) -> str:
    """Of the sources that judge: laws, generator, comparison and oracle. A verdict of others may not be theirs."""
    summary = hashlib.sha256()
    for pattern in ("properties/*.py", "properties/strategies/*.py", "references/*.py"):
        for path in sorted(root.glob(pattern)):
            summary.update(f"{path.relative_to(root)} {path.read_text()}".encode())
    return summary.hexdigest()[:16]


def to_record(verdict: Verdict) -> dict[str, Any]:
    """One verdict."""
    mutant = verdict.mutant
    return {
        "id": mutant.id,
        "class": mutant.category,
        "change": mutant.change,
        "neutral": mutant.neutral,
        "digest": digest(mutant),
        "laws_digest": verdict.laws_digest,
        "outcome": verdict.outcome,
        "laws": list(verdict.laws),
        "kind": verdict.kind,
        "cases": verdict.cases,
        "seconds": round(verdict.seconds, 2),
        "total_seconds": round(verdict.total_seconds, 2),
        "tokens": verdict.tokens,
        "case": None if verdict.case is None else json.loads(verdict.case.to_json()),
        "report": verdict.report,
        "baselines": verdict.baselines,
    }


def from_record(record: dict[str, Any], mutant: Mutant) -> Verdict:
    """The verdict that ``to_record`` described."""
    return Verdict(
        mutant,
        outcome=record["outcome"],
        laws=tuple(record["laws"]),
        kind=record["kind"],
        cases=record["cases"],
        seconds=record["seconds"],
        total_seconds=record["total_seconds"],
        case=None if record["case"] is None else Case.from_json(json.dumps(record["case"])),
        report=record["report"],
        baselines=record["baselines"],
        laws_digest=record.get("laws_digest", ""),
    )


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file whole."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)


def known(
    path: Path | None, mutants: list[Mutant], wanted: dict[str, Any], *, also_wrong: bool = False
) -> dict[str, Verdict]:
    """The verdicts of a file that still hold, by id: as they should be, on the same text, by a run like the one wanted.

    A fault that survived is tried again, and so is one that other laws judged, unless ``also_wrong``.

    Args:
        path: of the file; nothing is known if there is none.
        mutants: of the run to come.
        wanted: fields that the file's run must share.
    """
    if path is None or not path.exists():
        return {}
    result = json.loads(path.read_text())
    if any(result[name] != value for name, value in wanted.items()):
        return {}
    laws = laws_digest()
    records = {record["id"]: record for record in result["mutants"]}
    return {
        m.id: from_record(old, m)
        for m in mutants
        if (old := records.get(m.id)) is not None
        and old["digest"] == digest(m)
        and (also_wrong or (old.get("laws_digest"), old["outcome"]) == (laws, SURVIVED if m.neutral else KILLED))
    }
