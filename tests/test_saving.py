"""A stored failure: a small file that validates, and a script that fails until the kernel is mended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from properties import saving, script, subjects
from properties.assertions import LawViolation, assert_same_outputs
from properties.case import Case, Row, Step
from properties.case_file import CaseFile
from properties.checking import check
from properties.exploring import Failure, failure_of
from properties.runner import run
from properties.subjects import Subject
from tests.command_line import ROOT

RAGGED = Case(
    rows=(Row(3, (2, 1)), Row(0, (1, 1), 1)),
    steps=(Step(padding=1), Step()),
    num_kv_heads=2,
    group_size=2,
    head_dim=5,
    dtype="bfloat16",
    start="kv_cache",
    capacity=8,
    cache_max_len=8,
    values="normal",
    cache_layout="gapped",
    key_layout="transposed",
)
PLAIN = Case(rows=(Row(7, (3,)),), op="attention", values="normal", is_causal=True, dtype="float16")
FULL = replace(RAGGED, cache_max_len=5)
HUGE = Case(rows=(Row(0, (8,)),), values="large_values", dtype="bfloat16")  # P.V may overflow, and does
# What to change in a correct kernel, on which case it shows, and as what.
FAULTS = {
    "out": ("@ query.float()) * scale", "@ query.float()) * scale * 1.5", RAGGED),
    "lse": ("lse = torch.logsumexp(logits, dim=0)", "lse = torch.logsumexp(logits, dim=0) + 0.01", PLAIN),
    "append": (" = key[row, :, : new[row]]", " = 2 * key[row, :, : new[row]]", RAGGED),
    "cache": ("    cache = None\n", "    k_cache[0, 0, -1] = 1.0\n    cache = None\n", RAGGED),
    "inputs": ("    cache = None\n", "    query[0, 0, 0] = 1.0\n    cache = None\n", RAGGED),
    "lengths": ("torch.tensor(total, dtype=torch.int32", "torch.tensor(cached, dtype=torch.int32", RAGGED),
    "overflow": ("total[row] > cache_max_len", "total[row] > 100 * cache_max_len", FULL),
    "raised": ("total[row] > cache_max_len", "total[row] >= cache_max_len", FULL),
    "shape": ("return (out, lse) if", "return (out[..., :-1].contiguous(), lse) if", PLAIN),
}


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels that import nothing but torch."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kernel(folder: Path, name: str, old: str = "", new: str = "") -> Subject:
    """The naive kernel in a module of its own, with a piece of its text replaced."""
    text = (ROOT / "properties/subjects/naive.py").read_text()
    assert old in text
    (folder / f"{name}.py").write_text(text.replace(old, new, 1))
    return subjects.load(f"{name}:attention_with_kv_cache")


def run_alone(path: Path, name: str, source: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script where nothing of this project can be imported; optionally on another kernel."""
    if source is not None:
        (path.parent / f"{name}.py").write_text(source)
    block = "import runpy, sys; sys.modules.update(dict.fromkeys(['properties', 'references', 'hypothesis']))"
    return subprocess.run(
        [sys.executable, "-c", f"{block}; runpy.run_path({str(path)!r}, run_name='__main__')"],
        cwd=path.parent,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("kind", FAULTS)
def test_the_script_fails_on_the_faulty_kernel(kind: str, kernels: Path) -> None:
    old, new, case = FAULTS[kind]
    subject = kernel(kernels, f"faulty_{kind}", old, new)
    with pytest.raises(LawViolation) as violation:
        check(case, subject)
    assert violation.value.kind == kind
    path = kernels / "script.py"
    path.write_text(script.write(failure_of("law", case, violation.value), subject, "case.json"))

    faulty = run_alone(path, subject.spec.partition(":")[0])
    assert faulty.returncode == 1, faulty.stdout + faulty.stderr
    assert "FAILED" in faulty.stdout
    assert faulty.stderr == ""


@pytest.mark.parametrize("case", [RAGGED, PLAIN, FULL, HUGE], ids=["ragged", "plain", "full", "huge"])
def test_the_script_passes_on_a_correct_kernel(case: Case, kernels: Path) -> None:
    path = kernels / "script.py"
    path.write_text(script.write(Failure("law", case, "out", "report"), kernel(kernels, "mended"), "case.json"))

    mended = run_alone(path, "mended")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert mended.stdout.startswith("FIXED")


def test_a_script_compares_two_runs_bit_for_bit(kernels: Path) -> None:
    old = "    cache = None\n"
    new = "    if k_cache.shape[2] == 9:\n        lse = lse.nextafter(torch.where(lse > -9, 9.0, lse))\n" + old
    subject = kernel(kernels, "faulty_bits", old, new)
    roomy = replace(RAGGED, capacity=9)
    with pytest.raises(LawViolation) as violation:
        assert_same_outputs(run(RAGGED, subject).outputs, run(roomy, subject).outputs)
    path = kernels / "script.py"
    path.write_text(script.write(failure_of("law", RAGGED, violation.value), subject, "case.json"))

    faulty = run_alone(path, "faulty_bits")
    assert (faulty.returncode, faulty.stderr) == (1, "")
    assert "FAILED: the bits must be the same" in faulty.stdout
    mended = run_alone(path, "faulty_bits", (ROOT / "properties/subjects/naive.py").read_text())
    assert mended.returncode == 0, mended.stdout + mended.stderr


@pytest.mark.parametrize(
    ("kind", "case", "words"),
    [
        ("guard", Case(), "its own checks cannot show this"),
        ("out", Case(rows=(Row(0, (2000,)),), head_dim=64, values="normal"), "too large to embed"),
    ],
)
def test_what_a_script_cannot_hold_it_replays_and_says_so(kind: str, case: Case, words: str, kernels: Path) -> None:
    text = script.write(Failure("law", case, kind, "report"), kernel(kernels, "large"), "case.json")

    assert words in text
    assert len(text) < 2000
    assert "'replay', str(here.with_name('case.json'))" in text.replace('"', "'")


def test_a_report_cannot_leave_the_docstring_of_its_script(kernels: Path) -> None:
    hostile = Failure("law", Case(), "raised", 'said """\nimport os; os.abort()\n""" and \\')
    text = script.write(hostile, kernel(kernels, "quoted"), "case.json")

    compiled = compile(text, "script", "exec")
    assert "import os; os.abort()" in str(compiled.co_consts[0])


def test_the_stored_file_validates_and_gives_the_case_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(subjects.VARIABLE, "properties.subjects.naive:attention_with_kv_cache")
    failure = Failure("append_stores_bit_exact_copies", RAGGED, "append", "a report", (), ("another law",))

    text = saving.save(failure, tmp_path / "candidates")
    (path,) = (tmp_path / "candidates").glob("*.json")

    schema = json.loads((ROOT / "fixtures/schema/case.schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema)
    assert CaseFile.read(path).case == RAGGED
    assert text.splitlines() == [
        "a report",
        "  also breaks: another law",
        f"  replay: python -m properties replay {path} --subject properties.subjects.naive:attention_with_kv_cache",
        f"  script: python {path.with_suffix('.py')}",
    ]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_digits_are_compact_and_complete(dtype: type[np.unsignedinteger]) -> None:
    bits = np.array([1, 2] + [3] * 9 + [65535, 4, 4], dtype)
    width = 2 * bits.itemsize
    text = script.digits(bits)

    read: list[int] = []
    for word in text.split():
        pattern, _, count = word.partition("*")
        read += [int(pattern[i : i + width], 16) for i in range(0, len(pattern), width)] * int(count or 1)
    assert read == bits.tolist()
    assert len(text.split()) == 3
