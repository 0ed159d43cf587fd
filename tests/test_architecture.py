"""Who may import whom, each checked in a fresh interpreter; and what no file of the repository may contain."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

HEAVY = {"torch", "triton"}
TEST_TOOLS = {"hypothesis", "pytest"}
OWN = {"flashcore", "references", "properties", "tests", "benchmarks"}

FORBIDDEN: dict[str, set[str]] = {
    "flashcore": TEST_TOOLS | {"transformers"} | (OWN - {"flashcore"}),
    "references": HEAVY | TEST_TOOLS | (OWN - {"references"}),
    "properties.case": HEAVY | TEST_TOOLS | {"flashcore", "tests", "benchmarks"},
    "properties.strategies": HEAVY | {"pytest", "flashcore", "tests", "benchmarks"},
}
"""For a package or module, and everything below it: what importing it must not load."""


def modules_of(name: str) -> list[str]:
    """The module, and all below it if it is a package, as files say; integrations need what they integrate with."""
    path = ROOT.joinpath(*name.split("."))
    if not path.is_dir():
        return [name]
    files = [p for p in path.rglob("*.py") if p.name != "__main__.py" and "integrations" not in p.parts]
    parts = (p.relative_to(ROOT).with_suffix("").parts for p in files)
    return sorted({".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts})


def loaded_by(modules: list[str], paths: list[Path]) -> set[str]:
    """Top-level names of what is loaded after importing the modules in a fresh interpreter.

    A module that comes with the interpreter, such as a plugin started by site-packages, is loaded before and
    does not count.
    """
    script = (
        "import importlib, json, sys\n"
        "before = set(sys.modules)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@cache
def loaded_by_project(name: str) -> set[str]:
    return loaded_by(modules_of(name), [ROOT])


@pytest.mark.parametrize("name", list(FORBIDDEN))
def test_a_package_imports_only_what_it_may(name: str) -> None:
    assert loaded_by_project(name) & FORBIDDEN[name] == set()


def test_references_need_numpy_and_the_standard_library_only() -> None:
    foreign = loaded_by_project("references") - set(sys.stdlib_module_names)

    # Names with an underscore are extension modules that NumPy brings along.
    assert {name for name in foreign if not name.startswith("_")} == {"numpy", "references"}


@pytest.mark.parametrize(
    ("name", "what", "source"),
    [
        ("references", "triton", "def late():\n    pass\nimport triton\n"),
        ("references", "flashcore", "from flashcore.errors import CacheOverflowError\n"),
        ("flashcore", "hypothesis", "import hypothesis.strategies\n"),
        ("flashcore", "references", "import references\n"),
    ],
)
def test_the_check_sees_a_forbidden_import(name: str, what: str, source: str, tmp_path: Path) -> None:
    """A module with the import, put where the package would find it, is reported."""
    (tmp_path / "trespasser.py").write_text(f"import {name}\n{source}")

    found = loaded_by(["trespasser"], [tmp_path, ROOT])

    assert what in found & FORBIDDEN[name]


def test_every_module_of_a_package_is_imported() -> None:
    modules = modules_of("flashcore")

    assert {"flashcore", "flashcore.fast.kernels.split_kv", "flashcore.validation"} <= set(modules)
    assert modules_of("properties.case") == ["properties.case"]


def tracked_files() -> list[Path]:
    """Files under version control, or all files of a copy without it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    hidden = re.compile(r"(^|/)(\.|__pycache__|build|dist)")
    return [p for p in ROOT.rglob("*") if p.is_file() and not hidden.search(str(p.relative_to(ROOT)))]


# Written apart, so that this file does not contain what it looks for.
_HOME_PATHS = "|".join(f"/{top}/" for top in ("home", "work", "root", "Users", "mnt", "scratch"))
MACHINE = re.compile(rf"""(?<![\w.~/-])(?:{_HOME_PATHS})[\w.-]+|[A-Z]:\\Users\\""")


def mentions(text: str) -> list[str]:
    """Paths of somebody's machine in a text."""
    return MACHINE.findall(text)


def test_no_file_mentions_a_path_of_somebodys_machine() -> None:
    found = {}
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        if mentions(text):
            found[str(path.relative_to(ROOT))] = mentions(text)

    assert found == {}


@pytest.mark.parametrize("start", ["", "see ", "(", '"', "file=", "`"])
def test_a_path_of_somebodys_machine_is_seen(start: str) -> None:
    top = "home"

    assert mentions(f"{start}/{top}/somebody/project")


@pytest.mark.parametrize("text", ["a/work/b", "https://example.org/home/page", "../root/x", "/tmp/x", "/dev/null"])
def test_other_paths_are_left_alone(text: str) -> None:
    assert mentions(text) == []
