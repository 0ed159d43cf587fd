"""The law x verdict table: what is kept of a result, and that the document shows what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from properties import sections
from properties.__main__ import main
from properties.subjects import verdicts
from tests.command_line import ROOT

FAILURE = """\
out exceeds its error budget in 16 of 16 elements
  worst at [batch=0, head=0, q=0, d=15]: expected 0x0p+0, got -0x1.bdae5ep-1
  error 8.7e-01 = 8e+04 x budget 1.1e-05 (logit 1.0e-05)
  case: batch=1, cached=1, new=1"""


def law(name: str, verdict: str, **fields: Any) -> dict[str, Any]:
    found = {"law": name, "verdict": verdict, "cases": 5, "calls": 0, "not_offered": {}, "worst_out": 0.0}
    return {**found, "worst_lse": 0.0, "failure": None, **fields}


def result(**fields: Any) -> dict[str, Any]:
    laws = [
        law("first_law", "holds", calls=9, worst_out=0.25, not_offered={"scale 0.0": 2}),
        law("second_law", "FAILS", failure={"report": FAILURE}),
        law("third_law", "FAILS", failure={"report": "the kernel killed its process"}),
        law("fourth_law", "not offered", not_offered={"bfloat16": 5}),
    ]
    found = {"subject": "some-kernel", "versions": {"python": "3.11", "kernel": "1.2"}, "seed": 7, "seconds": 60.2}
    return {**found, "interrupted": False, "not_offered": {"fifth_law": "lse"}, "laws": laws, **fields}


def test_verdicts_cases_and_worst_errors_are_kept_and_shown() -> None:
    text = verdicts.markdown(
        [verdicts.summary(result()), verdicts.summary(result(subject="other", laws=[law("x", "holds")]))]
    )

    assert "| `some-kernel` | python 3.11, kernel 1.2 | 13 | 60 | 3 | 2 | 2 | 8e+04 |" in text
    assert "| first law | holds 3 (0.25) |  |" in text
    assert "| second law | **fails** 5 (8e+04) |  |" in text
    assert "| third law | **fails** 5 |  |" in text
    assert "| x |  | holds 5 |" in text
    assert "fourth law" not in text
    small = "out exceeds its error budget in 16 of 16 elements; batch=1, cached=1, new=1"
    assert f"* `some-kernel`, second law: {small}\n" in text


def test_a_result_replaces_what_was_kept_of_its_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / verdicts.FOLDER).mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    document = tmp_path / verdicts.DOCUMENT
    document.write_text(f"Before\n{sections.begin(verdicts.SECTION)}\nSTALE\n{sections.END}\nAfter\n")
    (tmp_path / "result.json").write_text(json.dumps(result()))

    assert main(["subjects", "--verdicts", "result.json"]) == 0
    first = document.read_text()
    assert main(["subjects", "--verdicts", "result.json"]) == 0
    assert document.read_text() == first
    assert first.startswith(f"Before\n{sections.begin(verdicts.SECTION)}\n\n| subject |")
    assert first.endswith(f"{sections.END}\nAfter\n")
    assert "STALE" not in first


@pytest.mark.parametrize("fields", [{"interrupted": True}, {"laws": []}])
def test_a_result_that_is_not_complete_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a complete result of verify --json"):
        verdicts.summary(result(**fields))


def test_the_document_shows_what_is_kept() -> None:
    section = sections.read(ROOT / verdicts.DOCUMENT, verdicts.SECTION)

    assert section == verdicts.markdown(verdicts.kept(ROOT)).strip()


def test_a_document_without_the_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "document.md").write_text(sections.begin("another command"))

    with pytest.raises(ValueError, match="must have a section from <!-- written by: this command"):
        sections.write(tmp_path / "document.md", "this command", "text")
