"""The law x verdict tables: what is kept of a result, and that the document shows what is kept."""

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
    found["device"] = "Triton's interpreter on 2 CPU cores; python 3.11, kernel 1.2"
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


def make_document(root: Path) -> Path:
    (root / verdicts.GPU_FOLDER).mkdir(parents=True)
    document = root / verdicts.DOCUMENT
    document.parent.mkdir()
    cpu, gpu = (f"{sections.begin(each)}\nSTALE\n{sections.END}" for each in (verdicts.SECTION, verdicts.GPU_SECTION))
    document.write_text(f"Before\n{cpu}\nBetween\n{gpu}\nAfter\n")
    return document


def test_a_result_replaces_what_was_kept_of_its_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = make_document(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(result()))

    assert main(["subjects", "--verdicts", "result.json"]) == 0
    first = document.read_text()
    assert main(["subjects", "--verdicts", "result.json"]) == 0
    assert document.read_text() == first
    assert first.startswith(f"Before\n{sections.begin(verdicts.SECTION)}\n\n| subject |")
    assert first.endswith(f"{sections.END}\nAfter\n")
    assert "STALE" not in first


def test_a_gpu_has_its_own_table(tmp_path: Path) -> None:
    document = make_document(tmp_path)
    gpu = result(device="NVIDIA H100 80GB HBM3 (sm_90); python 3.12", versions={"python": "3.12"})
    for name, each in (("cpu.json", result()), ("gpu.json", gpu)):
        (tmp_path / name).write_text(json.dumps(each))

    verdicts.update([tmp_path / "cpu.json", tmp_path / "gpu.json"], tmp_path)

    assert "| `some-kernel` | python 3.11, kernel 1.2 |" in sections.read(document, verdicts.SECTION)
    assert "| `some-kernel` | python 3.12 |" in sections.read(document, verdicts.GPU_SECTION)
    assert "3.12" not in sections.read(document, verdicts.SECTION)
    assert "3.11" not in sections.read(document, verdicts.GPU_SECTION)


@pytest.mark.parametrize("fields", [{"interrupted": True}, {"laws": []}])
def test_a_result_that_is_not_complete_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a complete result of verify --json"):
        verdicts.summary(result(**fields))


@pytest.mark.parametrize(
    ("name", "folder"), [(verdicts.SECTION, verdicts.FOLDER), (verdicts.GPU_SECTION, verdicts.GPU_FOLDER)]
)
def test_the_document_shows_what_is_kept(name: str, folder: Path) -> None:
    section = sections.read(ROOT / verdicts.DOCUMENT, name)

    assert section == verdicts.markdown(verdicts.kept(ROOT / folder)).strip()
