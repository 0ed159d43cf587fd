"""Every finding is complete, states its versions, and differs from the others in cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from properties import findings, sections
from properties.findings import FindingError

ROOT = Path(__file__).parents[1]

RECORD: dict[str, Any] = {
    "format": 1,
    "id": "some-package-drops-a-key",
    "role": "finding",
    "subject": "attend()",
    "package": "some.package",
    "python": "3.11",
    "versions": {"some.package": "1.2.0", "numpy": "2.4.6"},
    "device": "CPU",
    "title": "The last key is dropped",
    "cause": "The loop ends one tile early.",
    "promise": {"basis": "documented", "text": "All keys are attended to.", "source": "https://example.org/docs#keys"},
    "case": "One query, two keys.",
    "observed": "1",
    "expected": "2",
    "check": {"how": "by hand", "text": "The mean of 1 and 3 is 2."},
    "tracker": {"status": "not found in its tracker", "url": None},
    "found": "2026-11-28",
}
SCRIPT = '''"""The last key is dropped."""

# /// script
# requires-python = "==3.11.*"
# dependencies = ["numpy==2.4.6", "some.package==1.2.0"]
# ///

import sys

import numpy as np

print(np.__version__)
sys.exit(0)
'''


def write(folder: Path, record: dict[str, Any], script: str = SCRIPT) -> Path:
    path = folder / f"{record['id']}.json"
    path.write_text(json.dumps(record))
    path.with_suffix(".py").write_text(script)
    return path


def test_every_stored_finding_is_complete() -> None:
    found = findings.load_all(ROOT / findings.FOLDER)

    scripts = {path.name for path in (ROOT / findings.FOLDER).glob("*.py")}
    assert scripts == {each.script.name for each in found}


def test_the_document_lists_every_stored_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    assert sections.read(findings.DOCUMENT, findings.SECTION) == findings.markdown(findings.load_all()).strip()


def test_a_finding_is_listed_with_all_that_a_reader_needs(tmp_path: Path) -> None:
    text = findings.markdown([findings.load(write(tmp_path, RECORD))])

    assert "**The last key is dropped**" in text
    assert "some.package 1.2.0, numpy 2.4.6, Python 3.11." in text
    assert "Contradicts (documented): All keys are attended to. ([source](https://example.org/docs#keys))" in text
    assert "Checked by hand: The mean of 1 and 3 is 2." in text
    assert (
        "Tracker: not found in its tracker. `python -m pip install some.package==1.2.0 numpy==2.4.6 && python " in text
    )


def test_a_complete_finding_is_read_and_says_how_to_see_it(tmp_path: Path) -> None:
    found = findings.load(write(tmp_path, RECORD))

    script = tmp_path / "some-package-drops-a-key.py"
    assert found.command == f"python -m pip install some.package==1.2.0 numpy==2.4.6 && python {script}"


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: {name: value for name, value in record.items() if name not in names}


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: {**record, **fields}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("promise"), "'promise' is a required property"),
        (changed(severity="high"), "'severity' was unexpected"),
        (changed(promise={**RECORD["promise"], "source": "the docs"}), "promise.source"),
        (changed(check={"how": "it looks wrong", "text": "Really."}), "check.how"),
        (changed(tracker={"status": "known", "url": None}), "tracker.url"),
        (changed(tracker={"status": "not found in its tracker", "url": "https://example.org/1"}), "tracker.url"),
        (changed(versions={"some.package": ">=1", "numpy": "2.4.6"}), "versions.some.package"),
        (changed(versions={"numpy": "2.4.6"}), "versions must name some.package"),
        (changed(title="two\nlines"), "title"),
        (changed(id="other-package-drops-a-key"), "must be the name of the file and start with the package"),
    ],
)
def test_an_incomplete_record_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], dict[str, Any]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(FindingError) as refused:
        findings.load(write(tmp_path, change(RECORD)))

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("# /// script\n", "", "must name its versions"),
        ("numpy==2.4.6", "numpy", "the header's dependencies must be numpy==2.4.6, some.package==1.2.0"),
        ("==3.11.*", ">=3.11", "requires-python must be '==3.11.*'"),
        ("dependencies = [", "dependencies = ", "the header must be TOML"),
        ("import sys", "import properties.case", "got properties"),
        ("import sys", "from . import sys", "got ."),
        ("import sys", "import", "invalid syntax"),
    ],
)
def test_a_script_that_needs_more_than_it_says_is_refused(old: str, new: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(FindingError) as refused:
        findings.load(write(tmp_path, RECORD, SCRIPT.replace(old, new)))

    assert words in str(refused.value)


def test_a_record_without_its_script_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, RECORD)
    path.with_suffix(".py").unlink()

    with pytest.raises(FindingError, match="No such file"):
        findings.load(path)


def test_two_findings_of_one_cause_are_one(tmp_path: Path) -> None:
    for name in ("some-package-first", "some-package-second"):
        write(tmp_path, {**RECORD, "id": name})

    with pytest.raises(FindingError, match="have one cause"):
        findings.load_all(tmp_path)
