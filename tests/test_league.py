"""The league: equal problems, one ruler, and nobody's wrong answers hidden."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from properties import subjects
from properties.__main__ import main
from properties.assertions import assert_same_bits
from properties.capabilities import EVERYTHING, Capabilities, NotOffered
from properties.case import Case, Row
from properties.league import problems, report, standings
from properties.league.measuring import by_one_rule, measure
from properties.runner import run
from references.arithmetic_model import PERMISSIVE
from tests.command_line import ROOT

RIGHT, TOP_LEFT = "docs.examples.mine:attention", "docs.examples.top_left:attention"
ABORTS = "tests.faulty_subjects:aborts"


def test_a_seed_names_different_problems_that_nearly_all_take() -> None:
    drawn = problems.draw(20, seed=3)

    assert drawn == problems.draw(20, seed=3) != problems.draw(20, seed=4)
    assert len(set(drawn)) == 20
    assert {case.is_causal for case in drawn} == {False, True}
    for case in drawn:
        problems.COMMON.require(case)


def test_a_kernel_without_a_cache_gets_the_same_numbers() -> None:
    subject = subjects.load("torch-sdpa")
    case = next(case for case in problems.draw(20, seed=0) if case.rows[0].cached and case.is_causal)
    plain = problems.admitted(case, replace(subject.capabilities, ops=("attention",)))

    assert (plain.op, case.op) == ("attention", "attention_with_kv_cache")
    assert problems.admitted(case, EVERYTHING) == case
    (first,), (second,) = run(case, subject).outputs, run(plain, subject).outputs
    assert_same_bits(first, second)
    with pytest.raises(NotOffered, match="head_dim"):
        problems.admitted(case, Capabilities(head_dims=(1,)))


def test_all_that_can_run_here_compete() -> None:
    here, there = standings.runnable("cpu"), standings.runnable("cuda")

    assert {"flashcore", "torch-sdpa"} <= set(here) & set(there)
    assert "torch-sdpa-flash-cuda" in set(there) - set(here)


def test_one_budget_for_all_is_that_of_an_unknown_kernel_in_the_smallest_tiles() -> None:
    ruler = by_one_rule(subjects.load("flashcore"))
    case = problems.draw(1, seed=0)[0]

    assert ruler.model("cpu") == ruler.model("cuda") == PERMISSIVE
    assert ruler.tiles(case, 3, 30, 3) == ruler.tiles(case, 33, 0, 33) == (((0, 16),), ((16, 32),), ((32, 33),))


def test_each_problem_weighs_the_same_and_what_is_no_number_is_said() -> None:
    small, large = np.array([1.0], np.float32), np.zeros(999, np.float32)
    found = standings.quantiles([small, large, np.array([], np.float32)])

    assert found == {"p10": 0, "p25": 0, "p50": 0, "p75": 1, "p90": 1, "p99": 1, "max": 1}
    assert standings.quantiles([np.array([0.5, np.inf], np.float32)])["max"] is None  # type: ignore[index]
    assert standings.quantiles([]) is None


def entry(subject: str, **fields: Any) -> dict[str, Any]:
    out = {**dict.fromkeys(standings.QUANTILES, 0.0), "p99": 0.5, "max": None}
    found = {
        "subject": subject,
        "dtype": "float32",
        "device": "cpu",
        "problems": 4,
        "wrong": {},
        "out": out,
        "lse": None,
    }
    return {**found, "versions": {"some-package": "1.2"}, "not_offered": {}, **fields}


def results(*entries: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"format": 1, "seed": 0, "problems": 4, "fingerprint": "abc", "entries": list(entries), **fields}


def test_results_of_the_same_problems_are_put_together_the_wrong_ones_last() -> None:
    merged = standings.merge([results(entry("off", wrong={"3": "it raised"})), results(entry("right")), results()])

    assert [e["subject"] for e in merged["entries"]] == ["off", "right"]
    assert [e["subject"] for e in report.ranked(merged)] == ["right", "off"]
    text = report.markdown(merged, None, Path())
    assert "| float32 | off | 4 | 1 | 0 | 0 | 0.5 | inf | - | - | - | - |" in text
    assert "* off, float32, 1 of 4; the first is problem 3: it raised" in text
    assert "| off | some-package 1.2 |" in text


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (results(fingerprint="def"), "must be of the same problems, got fingerprint abc and def"),
        (results(entry("right")), "each kernel must be there once, got right, float32, cpu twice"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(other: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        standings.merge([results(entry("right")), other])


def test_who_is_wrong_or_dies_is_counted_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A right kernel, one whose causal mask is misplaced, and one that aborts at 17 keys; shown again from the file."""
    files = {f"--{name}": tmp_path / f"league.{end}" for name, end in (("json", "json"), ("plot", "png"))}
    run_arguments = ["--subject", RIGHT, TOP_LEFT, ABORTS, "--cases", "5", "-n", "1"]
    assert main(["league", *run_arguments, *(str(each) for pair in files.items() for each in pair)]) == 0
    printed = capsys.readouterr().out

    found = {(e["subject"], e["dtype"]): e for e in standings.read(files["--json"])["entries"]}
    right, top_left, aborts = (found[name, "bfloat16"] for name in (RIGHT, TOP_LEFT, ABORTS))
    assert (right["problems"], right["wrong"]) == (5, {})
    assert 0 < right["out"]["max"] < 1 < top_left["out"]["max"]
    assert 0 < len(top_left["wrong"]) < 5
    assert {"the kernel died or hung: the process was killed by SIGABRT"} == set(aborts["wrong"].values())
    assert aborts["lse"]["max"] < 1
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
    assert f"{TOP_LEFT}, bfloat16, problem" in printed

    assert main(["league", "--merge", str(files["--json"]), "--markdown", str(tmp_path / "league.md")]) == 0
    assert capsys.readouterr().out in printed
    assert f"| float32 | {RIGHT} | 5 | 0 |" in (tmp_path / "league.md").read_text()


def test_the_document_shows_the_stored_results() -> None:
    stored = report.table(standings.read(ROOT / "fixtures/league.json"))
    lines = [line for line in (ROOT / "docs/league.md").read_text().splitlines() if line.startswith("| ")]

    assert [lines[0], *lines[2 : 1 + len(stored)]] == [f"| {' | '.join(row)} |" for row in stored]


def truncated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
    """Attention whose weights are cut to 8 bits, which rounds them toward zero."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q.float() @ k.mT * q.shape[3] ** -0.5
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1 + k.shape[2] - q.shape[2]) > 0, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    cut = (weights.view(torch.int32) & ~0xFFFF).view(torch.float32)
    out: torch.Tensor = cut @ v / weights.sum(-1, keepdim=True)
    return out.to(q.dtype)


def test_weights_rounded_toward_zero_lean_and_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    leans = {}
    row = Case((Row(32, (32,)),), op="attention", group_size=1, head_dim=32, dtype="bfloat16", values="normal")
    for spec in (RIGHT, f"{__name__}:truncated"):
        monkeypatch.setattr(subjects, "active", lambda spec=spec: subjects.load(spec))
        measured = [measure(replace(row, seed=seed)) for seed in range(16)]
        leans[spec] = standings.lean([each.lean for each in measured if each.lean is not None])
    right, cut = leans.values()

    assert right is not None
    assert cut is not None
    assert abs(right["mean"]) < 0.01
    assert cut["mean"] < -0.03
    assert cut["z"] < -10
    assert standings.lean([0.5]) is None
    without = results(entry("right"), entry("other"))
    header, *rows = report.table(
        {**without, "entries": [{**without["entries"][0], "lean": cut}, without["entries"][1]]}
    )
    assert header == [*report.HEADER, "lean"]
    assert {row[-1] for row in rows} == {"-", f"{100 * cut['mean']:+.2g} % (z {cut['z']:+.2g})"}
    assert report.table(without)[0] == list(report.HEADER)
