"""The laws see planted faults, and nothing else: a sample of every class, and all that can be said without running."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

from properties import laws
from properties.case import Case
from properties.exploring import Failure
from properties.mutants import catalogue, record, report, trial
from properties.mutants.catalogue import ALL, select
from properties.mutants.mutant import ROOT, AnchorError, Edit, Mutant, edited, write_mutated
from properties.mutants.trial import KILLED, SURVIVED, UNSOUND, Verdict
from tests.command_line import properties

IDS = {mutant.id for mutant in ALL}
# The catalogue of the project's issue: what cannot exist in these kernels is not in it.
LISTED = (
    *("M01", "M02", "M04", "M05", "M07", "M09", "M11", "M12", "M13", "M16", "M22", "M23", "M25", "M26", "M28", "M29"),
    *("M31", "M40", "M42", "M44", "M45", "M48", "M49", "M57", "M58", "M61", "M68", "M69", "M72"),
    *("W1", "W2", "W3", "W4", "W5", "W6", "W7", "N2", "N3", "N4", "N5", "N6"),
)
HARMLESS = Mutant(
    "X1",
    "TAIL",
    "nothing is different",
    "nowhere",
    (Edit("flashcore/errors.py", "nothing was written.", "nothing at all was written."),),
    ("append_stores",),
)


def test_every_listed_fault_is_planted_and_ids_are_unique() -> None:
    assert set(LISTED) <= IDS
    assert len(IDS) == len(ALL)
    assert len([mutant for mutant in ALL if mutant.id.startswith("F")]) >= 15


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.id)
def test_every_mutant_applies_and_changes_code(mutant: Mutant) -> None:
    for file, text in edited(mutant).items():
        changed, shipped = ast.parse(text), ast.parse((ROOT / file).read_text())
        assert ast.dump(changed) != ast.dump(shipped)


def test_every_mutant_names_laws_that_exist() -> None:
    names = list(laws.discover())
    for mutant in ALL:
        for words in mutant.laws:
            assert any(words in name for name in names), f"{mutant.id}: no law is called *{words}*"


@pytest.mark.parametrize(("anchor", "count"), [("no such text", 0), ("import", 2)])
def test_an_anchor_that_is_not_there_once_is_an_error(anchor: str, count: int) -> None:
    lost = replace(HARMLESS, edits=(Edit("flashcore/__init__.py", anchor, ""),))

    with pytest.raises(AnchorError, match=r"X1: an anchor must be found once in flashcore/__init__.py, got \d+ times"):
        edited(lost)
    assert (ROOT / "flashcore/__init__.py").read_text().count(anchor) >= count


def test_a_lost_anchor_ends_the_run_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from properties.__main__ import main

    lost = replace(HARMLESS, edits=(Edit("flashcore/__init__.py", "no such text", ""),))
    monkeypatch.setattr(catalogue, "ALL", (*ALL, lost))
    status = main(["mutants"])

    assert status == 2
    assert "X1: an anchor must be found once" in capsys.readouterr().err


def test_only_the_copy_is_changed(tmp_path: Path) -> None:
    mutant = select(["M01"])[0]
    before = {path: path.read_bytes() for path in (ROOT / "flashcore").rglob("*.py")}
    write_mutated(mutant, tmp_path)

    changed = [path for path, text in before.items() if (tmp_path / path.relative_to(ROOT)).read_bytes() != text]
    assert [str(path.relative_to(ROOT)) for path in changed] == [mutant.edits[0].file]
    assert all(path.read_bytes() == text for path, text in before.items())


class _Stub:
    """Stands for the shipped source: it fails, or does not."""

    def __init__(self, report: str | None) -> None:
        self.report = report

    def failure(self, law: str, case: Case) -> str | None:
        del law, case
        return self.report


@pytest.mark.parametrize(("found", "outcome"), [(None, KILLED), ("out exceeds its budget", UNSOUND)])
def test_a_case_that_the_shipped_source_fails_too_is_no_kill(found: str | None, outcome: str) -> None:
    verdict = Verdict(HARMLESS)
    trial._judge(verdict, Failure("law", Case(), "out", ""), _Stub(found))  # type: ignore[arg-type]

    assert verdict.outcome == outcome


def test_a_sample_of_every_class_is_killed(tmp_path: Path) -> None:
    done = properties("mutants", "--fast", "-n", 1, "--json", "result.json", folder=tmp_path, seconds=900)

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())["mutants"]
    assert {m["class"] for m in found} == {mutant.category for mutant in ALL if not mutant.neutral}
    assert all(m["outcome"] == KILLED for m in found)
    # A mutant that does not even run would be an empty success.
    assert not [m["id"] for m in found if m["kind"] in ("error", "search")]


def test_neutral_changes_survive(tmp_path: Path) -> None:
    ids = [mutant.id for mutant in ALL if mutant.neutral]
    done = properties(
        *("mutants", "--fast", "-n", 1, "--id", *ids, "--seconds", 6, "--json", "result.json"),
        folder=tmp_path,
        seconds=900,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "result.json").read_text())["mutants"]
    assert [m["id"] for m in found] == ids
    assert all(m["outcome"] == SURVIVED and m["cases"] for m in found)


def test_a_resumed_run_keeps_the_verdicts_of_mutants_that_are_still_the_same(tmp_path: Path) -> None:
    first, other = select(["M01", "M12"])
    verdict = Verdict(first, KILLED, ("law",), "out", 3, 2.5, 4.0, Case(), "report", {"grid": True})
    verdict.laws_digest = record.laws_digest()
    path = tmp_path / "result.json"
    record.write(path, {"profile": "ci", "mutants": [record.to_record(verdict)]})

    assert record.known(path, [first, other], {"profile": "ci"}) == {"M01": verdict}
    assert record.known(path, [first], {"profile": "nightly"}) == {}
    changed = replace(first, edits=(replace(first.edits[0], replacement="        if MASK_N and MASK_D:\n"),))
    assert record.known(path, [changed], {"profile": "ci"}) == {}
    record.write(path, {"profile": "ci", "mutants": [record.to_record(replace(verdict, outcome=SURVIVED))]})
    assert record.known(path, [first], {"profile": "ci"}) == {}
    assert set(record.known(path, [first], {"profile": "ci"}, also_wrong=True)) == {"M01"}
    earlier = replace(verdict, laws_digest="of other laws")
    record.write(path, {"profile": "ci", "mutants": [record.to_record(earlier)]})
    assert record.known(path, [first], {"profile": "ci"}) == {}
    assert record.known(path, [first], {"profile": "ci"}, also_wrong=True) == {"M01": earlier}
    assert record.known(None, [first], {}) == record.known(tmp_path / "none.json", [first], {}) == {}


@pytest.mark.parametrize("file", ["properties/test_law.py", "properties/strategies/rows.py", "references/oracle.py"])
def test_laws_are_others_when_a_source_of_theirs_changes(tmp_path: Path, file: str) -> None:
    before = record.laws_digest(tmp_path)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("one")
    one = record.laws_digest(tmp_path)
    (tmp_path / file).write_text("another")

    assert len({before, one, record.laws_digest(tmp_path)}) == 3


def test_the_document_shows_survivors_first_and_what_other_suites_miss() -> None:
    killed, survivor, neutral = select(["M01", "M12", "N2"])
    found = {"four tests at 1e-3": False, "grid at 1.5e-2": True}
    verdicts = (
        Verdict(killed, KILLED, ("a_law", "another"), "out", 3, 2.5, 4.0, Case(), "", found),
        Verdict(survivor, SURVIVED, cases=9),
        Verdict(neutral, SURVIVED, cases=50),
    )
    pending = tuple(select(["M02"]))
    verdicts[0].laws_digest = verdicts[2].laws_digest = "as they are"
    score = report.Score(verdicts, (), "two cores", "ci", 70, 12.0, pending=pending, laws_digest="as they are")
    text = report.markdown(score, "2000-01-31")

    assert "on 2000-01-31; two cores." in text
    assert "* 1 of 2 planted faults killed (50 %), half of them within 2.5 s; 70 laws, profile ci" in text
    assert "* 0 of 1 killed by the four tests at 1e-3\n* 1 of 1 killed by the grid at 1.5e-2" in text
    assert "* 0 of 1 neutral changes killed, in 50 cases" in text
    assert "* 1 verdicts are those of earlier laws: M12" in text
    assert "* 1 mutants not run yet: M02" in text
    assert text.index("| M12 | MASK") < text.rindex("| M01 | TAIL") < text.index("| N2 | NEUTRAL")
    assert "| M01 | the padding keys of the last tile take part in the softmax, with score 0 | batch=1" in text


def test_a_fault_that_no_law_sees_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from properties.mutants import score

    monkeypatch.setattr(catalogue, "ALL", (*ALL, HARMLESS))
    result = score.run(score.Options(ids=("X1",), fast=True, seconds=2.0), str)

    assert [v.outcome for v in result.verdicts] == [SURVIVED]
    assert not result.perfect
