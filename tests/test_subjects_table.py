"""The table of subjects, and a function of one's own put under test."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from properties import subjects
from properties.__main__ import main
from properties.assertions import LawViolation
from properties.case import Case, Row, Step
from properties.checking import check
from properties.subjects.adapter import as_subject
from tests.command_line import ROOT


def bare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend without options."""
    logits = q @ k.mT / math.sqrt(q.shape[3])
    return logits.softmax(dim=-1) @ v


def with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, return_lse: bool) -> Any:
    """Attend with a scale of the caller's."""
    logits = q @ k.mT * scale
    out = logits.softmax(dim=-1) @ v
    return (out, logits.logsumexp(dim=-1)) if return_lse else out


def test_every_subject_has_a_row_without_its_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    assert main(["subjects"]) == 0
    rows = {row[1]: row[3:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row[:1] == ["│"]}

    assert list(rows) == [subjects.DEFAULT, *subjects.ADAPTERS]
    needs = {name for name in subjects.ADAPTERS if subjects.find(name).requires}
    assert {name for name, row in rows.items() if row[0] == "no"} == needs
    gqa = " ".join(rows["onnxruntime-gqa"])
    assert "f32 f16 │ 8-256 by 8 │ any │ yes │ ragged │ functional │ no" in gqa


def test_one_subject_is_shown_with_its_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subjects", "torch-sdpa", f"{__name__}:bare"]) == 0

    sdpa, _, own = capsys.readouterr().out.partition(f"{__name__}:bare")
    assert "top-left; masks are given by the caller" in sdpa
    assert "not known" in own


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("bare", {"masks": (False,), "scales": "default", "lse": False}),
        ("with_lse", {"masks": (False,), "scales": "any", "lse": True}),
    ],
)
def test_what_a_function_offers_is_read_off_its_arguments(name: str, offered: dict[str, Any]) -> None:
    subject = subjects.load(f"{__name__}:{name}")

    assert {field: getattr(subject.capabilities, field) for field in offered} == offered
    assert subject.capabilities.ops == ("attention",)
    case = Case((Row(5, (5,)),), op="attention", values="normal", group_size=1)
    used = check(case, subject)
    assert 0 < used.out < 1
    assert (used.lse > 0) == subject.capabilities.lse


FEWER_QUERIES = Case((Row(2, (1,)),), op="attention", is_causal=True, values="iota", group_size=1)


def test_the_documented_example_holds_and_its_faulty_twin_fails() -> None:
    mine, top_left = (subjects.load(f"docs.examples.{name}:attention") for name in ("mine", "top_left"))

    assert check(FEWER_QUERIES, mine).out < 1
    with pytest.raises(LawViolation, match="out exceeds its error budget in 16 of 16 elements"):
        check(FEWER_QUERIES, top_left)
    square = replace(FEWER_QUERIES, rows=(Row(3, (3,)),))
    assert check(square, top_left).out < 1


@pytest.mark.parametrize(
    "name", ["torch-flex-eager", "transformers-dynamic-cache", "transformers-static-cache", "transformers-sdpa"]
)
def test_an_adapter_whose_package_the_tests_have_lies_within_the_error_budget(name: str) -> None:
    """A prompt, a chunk and a decode step, causal."""
    rows = (Row(0, (5, 3, 1)), Row(0, (5, 3, 1), 1))
    case = Case(rows, (Step(), Step(), Step()), 2, 3, head_dim=32, is_causal=True, values="normal", cache_max_len=16)

    assert 0 < check(case, subjects.load(name)).out < 1


def test_the_document_shows_the_example_files_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """All columns of the table but what is installed here and how many laws there are."""
    mine, fault, adapter = re.findall(r"```python\n(.*?)\n```", (ROOT / "docs/your-kernel.md").read_text(), re.DOTALL)
    shown = [line for line in (ROOT / "docs/your-kernel.md").read_text().splitlines() if line.startswith("| ")]
    examples = ROOT / "docs/examples"
    main(["subjects"])
    printed = [row.strip("│┃\n ") for row in capsys.readouterr().out.splitlines() if row[:1] in ("│", "┃")]
    cells = [[cell.strip() for cell in re.split("[│┃]", row)] for row in printed]

    assert mine == (examples / "mine.py").read_text().rstrip()
    assert fault in (examples / "top_left.py").read_text().splitlines()
    assert fault not in mine
    assert shown == [f"| {' | '.join([row[0], *row[2:-1]])} |" for row in cells]
    namespace: dict[str, Any] = {
        "my_attention": lambda q, k, v, mask, scale: scaled_dot_product_attention(q, k, v, mask, scale=scale)
    }
    exec(adapter, namespace)
    assert check(replace(FEWER_QUERIES, rows=(Row(2, (2,)),)), as_subject(namespace["Mine"](), "mine")).out < 1
