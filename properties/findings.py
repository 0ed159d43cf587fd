"""Defects found in public packages: one JSON file and one stand-alone script each, in ``fixtures/findings``.

A script imports the package, NumPy and the standard library only, names the exact versions in its header
(PEP 723, so that ``uv run FILE`` or ``pipx run FILE`` installs them), prints them with what was observed and expected,
and ends with status 0 while the defect is there and 1 once it is gone.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from properties.strict_json import parse

FOLDER = Path("fixtures/findings")
DOCUMENT = Path("docs/findings.md")
SECTION = "python -m properties findings"
SCHEMA = Path(__file__).parents[1] / "fixtures/schema/finding.schema.json"
# Distributions whose module has another name.
_MODULES = {"flashinfer-python": "flashinfer", "paddlepaddle": "paddle"}
_HOW = {"by hand": "by hand", "fractions": "with fractions", "mpmath": "with mpmath"}
_HEADER = re.compile(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", re.MULTILINE)


class FindingError(ValueError):
    """A finding's file or script is not what it must be; one line that names it."""


@dataclass(frozen=True)
class Reported:
    """One finding.

    Attributes:
        record: what the file holds; ``fixtures/schema/finding.schema.json`` says what that is.
        script: the program that shows it.
    """

    record: dict[str, Any]
    script: Path

    @property
    def command(self) -> str:
        """What a reader types to see it, in an environment of its own."""
        pins = " ".join(f"{name}=={version}" for name, version in self.record["versions"].items())
        return f"python -m pip install {pins} && python {self.script.as_posix()}"


def load(path: Path) -> Reported:
    """Read and check one finding and its script.

    Raises:
        FindingError: something is missing, or the two disagree.
    """
    try:
        record = parse(path.read_bytes())
        jsonschema.validate(record, json.loads(SCHEMA.read_text()))
    except (OSError, ValueError) as error:
        raise FindingError(f"{path}: {error}") from None
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the record"
        raise FindingError(f"{path}: {where}: {error.message.splitlines()[0][:300]}") from None
    assert isinstance(record, dict)
    name = record["id"]
    if path.stem != name or not name.startswith(re.sub("[-_.]+", "-", record["package"])):
        raise FindingError(f"{path}: id must be the name of the file and start with the package, got {name!r}")
    if record["package"] not in record["versions"]:
        raise FindingError(f"{path}: versions must name {record['package']}, got {', '.join(record['versions'])}")
    script = path.with_suffix(".py")
    _check_script(script, record["versions"], record["python"])
    return Reported(record, script)


def load_all(folder: Path = FOLDER) -> list[Reported]:
    """All findings of a folder, by name.

    Raises:
        FindingError: one is malformed, or two of a package have one cause.
    """
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    causes: dict[tuple[str, str], str] = {}
    for each in found:
        record = each.record
        other = causes.setdefault((record["package"], record["cause"]), record["id"])
        if other != record["id"]:
            raise FindingError(f"{record['id']} and {other} have one cause: keep the smaller case")
    return found


def markdown(found: Sequence[Reported]) -> str:
    """All findings by package, each with its releases, command, promise, second check and what the tracker says."""
    return "\n".join(_line(each) for each in found) + "\n"


def _line(each: Reported) -> str:
    record = each.record
    promise, check, tracker = record["promise"], record["check"], record["tracker"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    known = tracker["status"] if tracker["url"] is None else f"[{tracker['status']}]({tracker['url']})"
    role = "Positive control. " if record["role"] == "positive control" else ""
    return "\n".join(
        [
            f"* **{record['title']}** ([{record['id']}](../{each.script.as_posix()})). {role}{versions}, "
            f"Python {record['python']}.",
            f"  Observed: {record['observed']} Expected: {record['expected']}",
            f"  Contradicts ({promise['basis']}): {promise['text']} ([source]({promise['source']}))",
            f"  Checked {_HOW[check['how']]}: {check['text']}",
            f"  Tracker: {known}. `{each.command}`",
        ]
    )


def _check_script(path: Path, versions: dict[str, str], python: str) -> None:
    try:
        source = path.read_text()
        tree = ast.parse(source)
    except (OSError, SyntaxError) as error:
        raise FindingError(f"{path}: {error}") from None
    header = _HEADER.search(source)
    if header is None:
        raise FindingError(f"{path}: it must name its versions in a '# /// script' header (PEP 723), and has none")
    try:
        stated = tomllib.loads("".join(line[2:] for line in header[1].splitlines(keepends=True)))
    except tomllib.TOMLDecodeError as error:
        raise FindingError(f"{path}: the header must be TOML: {error}") from None
    pins = sorted(f"{name}=={version}" for name, version in versions.items())
    if sorted(stated.get("dependencies", [])) != pins:
        raise FindingError(
            f"{path}: the header's dependencies must be {', '.join(pins)}, got {stated.get('dependencies')}"
        )
    if stated.get("requires-python") != f"=={python}.*":
        raise FindingError(
            f"{path}: the header's requires-python must be '=={python}.*', got {stated.get('requires-python')!r}"
        )
    modules = {_MODULES.get(name, name.replace("-", "_").partition(".")[0]) for name in versions}
    known = modules | sys.stdlib_module_names
    foreign = sorted(_imported(tree) - known)
    if foreign:
        raise FindingError(f"{path}: it may import the standard library and its dependencies, got {', '.join(foreign)}")


def _imported(tree: ast.Module) -> set[str]:
    """Top-level names of all modules a program imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name if name.startswith(".") else name.partition(".")[0] for name in names}
