"""Files are data: what is wrong with one is said in one line, and nothing of it is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from properties import schedule
from properties.__main__ import main
from properties.case import Case, Row
from properties.case_file import CaseFile
from properties.replaying import promote
from properties.requirements import CaseError
from tests.command_line import NAIVE

CASE = Case(rows=(Row(0, (3,)),), values="integers")
GOOD = CaseFile("append_stores_bit_exact_copies", NAIVE, CASE, schedule.digest(CASE))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "case.json"
    path.write_text(GOOD.dumps())
    return path


def edited(**changes: object) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


HOSTILE: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda _: "",
    "truncated": lambda text: text[: len(text) // 2],
    "not json": lambda _: "cposix\nsystem\n",
    "not text": lambda text: b"\x80\x04\x95" + text.encode(),
    "a list": lambda _: "[]",
    "deep": lambda _: "[" * 100_000,
    "too large": lambda text: " " * 10_000_000 + text,
    "duplicate key": lambda text: text.replace('"law":', '"law": "x", "law":', 1),
    "unknown field": edited(command="rm -rf /"),
    "missing field": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "case"}),
    "other version": edited(format=2),
    "other generator": edited(generator=999),
    "wrong digest": edited(digest="0" * 64),
    "edited case": lambda text: text.replace('"seed": 0', '"seed": 1'),
    "float for int": lambda text: text.replace('"head_dim": 16', '"head_dim": 16.0'),
    "huge": lambda text: text.replace('"head_dim": 16', '"head_dim": 1000000'),
    "huge number": lambda text: text.replace('"head_dim": 16', f'"head_dim": {"9" * 5000}'),
    "not a number": lambda text: text.replace('"scale": null', '"scale": NaN'),
    "code": lambda text: text.replace('"values": "integers"', '"values": "__import__(\'os\').abort()"'),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_no_case_is_one_line_and_exit_2(
    change: Callable[[str], str | bytes], stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = change(stored.read_text())
    stored.write_bytes(text if isinstance(text, bytes) else text.encode())

    status = main(["replay", str(stored)])
    out, err = capsys.readouterr()

    assert status == 2
    assert err == ""
    assert out.startswith(f"ERROR  {stored}")
    assert len(out.splitlines()) == 1


def test_a_file_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "none.json"), str(tmp_path)]) == 2
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["ERROR", "ERROR"]


def test_good_files_are_run_beside_bad_ones_and_the_subject_in_a_file_is_not_imported(
    stored: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The control: the unchanged file is accepted, so it is the changes above that are refused."""
    unknown = tmp_path / "unknown.json"
    unknown.write_text(edited(law="no_such_law", subject="no.such:kernel")(GOOD.dumps()))

    status = main(["replay", str(stored), str(unknown), str(tmp_path / "none.json"), "--subject", NAIVE])
    out = capfd.readouterr().out

    assert status == 2
    assert f"FIXED  {stored}: append_stores_bit_exact_copies" in out
    assert f"ERROR  {unknown}: law must be one of the suite's, got 'no_such_law'" in out


def test_promotion_numbers_a_case_and_tells_its_story(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "regressions"
    first = promote(stored, "The first  story: a tale of two tiles, and more words", folder)
    other = tmp_path / "other.json"
    other.write_text(CaseFile("other_law", NAIVE, CASE, GOOD.digest).dumps())
    second = promote(other, "Второй", folder)

    assert first.name == "0001-the-first-story-a-tale-of.json"
    assert second.name == "0002-case.json"
    assert CaseFile.read(first).story == "The first story: a tale of two tiles, and more words"
    assert CaseFile.read(first).case == CASE


@pytest.mark.parametrize("story", ["", "  ", "x" * 5000])
def test_promotion_asks_for_a_story(story: str, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="--story must have 1 to 4000 characters"):
        promote(stored, story, tmp_path / "regressions")

    assert not (tmp_path / "regressions").exists()


def test_promotion_refuses_what_is_there_already_and_what_is_no_case(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "regressions"
    promote(stored, "once", folder)
    with pytest.raises(CaseError, match="is a regression already"):
        promote(stored, "twice", folder)

    stored.write_text("{}")
    assert main(["promote", str(stored), "--story", "nothing"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(list(folder.iterdir())) == 1
