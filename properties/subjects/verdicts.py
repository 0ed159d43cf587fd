"""The law x verdict tables of docs/findings.md, from results of ``verify --subject NAME --json FILE``.

What a table needs of each result is kept in ``fixtures/verdicts``, so that one subject can be judged again alone. A GPU
has a table and a folder of its own: the same subject may be another kernel there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from properties import sections

FOLDER = Path("fixtures/verdicts")
DOCUMENT = Path("docs/findings.md")
SECTION = "python -m properties subjects --verdicts FILE ..."
GPU_FOLDER = FOLDER / "gpu"
GPU_SECTION = f"{SECTION} on a GPU"
_BUDGETS = re.compile(r"^  error \S+ = (\S+) x budget", re.MULTILINE)
_CASE = re.compile(r"^  case: (.+)$", re.MULTILINE)

Summary = dict[str, Any]


def summary(result: dict[str, Any]) -> Summary:
    """What the table says of one run.

    Raises:
        ValueError: it is no result of ``verify``, or of a run that was cut short.
    """
    if not result.get("laws") or result["interrupted"]:
        raise ValueError("a verdict must be a complete result of verify --json, got something else")
    judged = [law for law in result["laws"] if law["verdict"] in ("holds", "FAILS")]
    return {
        "subject": result["subject"],
        "versions": result["versions"],
        "seed": result["seed"],
        "seconds": round(result["seconds"]),
        "not_offered": len(result["not_offered"]) + len(result["laws"]) - len(judged),
        "laws": {law["law"]: _judged(law) for law in judged},
    }


def _judged(law: dict[str, Any]) -> dict[str, Any]:
    """A law with the worst error over budget, its failure included; None where nothing was compared with a budget."""
    worst = max(law["worst_out"], law["worst_lse"]) if law["calls"] else None
    found = {"verdict": law["verdict"], "cases": law["cases"] - sum(law["not_offered"].values()), "worst": worst}
    if law["failure"] is not None:
        report = law["failure"]["report"]
        beyond, case = _BUDGETS.search(report), _CASE.search(report)
        found["worst"] = float(beyond[1]) if beyond else math.inf if "not a finite number" in report else None
        found |= {"what": report.splitlines()[0], "case": case[1] if case else ""}
    if found["worst"] is not None:
        found["worst"] = f"{found['worst']:.2g}"
    return found


def update(results: Sequence[Path], root: Path = Path()) -> None:
    """Keep what the results say, and write the document's sections anew.

    Raises:
        ValueError: a file is no such result, or the document has no such section.
    """
    for path in results:
        result = json.loads(path.read_text())
        found = summary(result)
        folder = GPU_FOLDER if "(sm_" in result["device"] else FOLDER
        (root / folder / f"{found['subject']}.json").write_text(json.dumps(found, indent=1) + "\n")
    for section, folder in ((SECTION, FOLDER), (GPU_SECTION, GPU_FOLDER)):
        sections.write(root / DOCUMENT, section, markdown(kept(root / folder)))


def kept(folder: Path) -> list[Summary]:
    """All that is kept in a folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def markdown(summaries: Sequence[Summary]) -> str:
    """One line a subject, then the laws that can be judged for some of them, then what breaks the laws that fail."""
    names = [each["subject"] for each in summaries]
    laws = list(dict.fromkeys(name for each in summaries for name in each["laws"]))
    header = ("subject", "versions", "cases", "s", "laws judged", "fail", "not offered", "worst error / budget")
    lines = [*_table(header, [_line(each) for each in summaries]), ""]
    rows = [[law.replace("_", " "), *(_cell(each["laws"].get(law)) for each in summaries)] for law in laws]
    lines += [*_table(("law", *names), rows), "", "The smallest case found of each law that fails:", ""]
    for each in summaries:
        failing = [(law, found) for law, found in each["laws"].items() if found["verdict"] == "FAILS"]
        lines += [f"* `{each['subject']}`, {law.replace('_', ' ')}: {f['what']}; {f['case']}" for law, f in failing]
    return "\n".join(lines) + "\n"


def _line(each: Summary) -> list[str]:
    laws = each["laws"].values()
    versions = {name: version for name, version in each["versions"].items() if name not in ("triton", "hypothesis")}
    worst = max((float(law["worst"]) for law in laws if law["worst"]), default=0.0)
    return [
        f"`{each['subject']}`",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        str(sum(law["cases"] for law in laws)),
        str(each["seconds"]),
        str(len(laws)),
        str(sum(law["verdict"] == "FAILS" for law in laws)),
        str(each["not_offered"]),
        f"{worst:.2g}",
    ]


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    verdict = "**fails**" if found["verdict"] == "FAILS" else "holds"
    return f"{verdict} {found['cases']}" + (f" ({found['worst']})" if found["worst"] else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
