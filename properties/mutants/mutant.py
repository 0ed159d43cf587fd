"""What a planted fault is, and how it gets into a copy of the source."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PRIMITIVES = "flashcore/fast/kernels/primitives.py"
PREFILL = "flashcore/fast/kernels/prefill.py"
PREFILL_SM90 = "flashcore/fast/kernels/prefill_sm90.py"
SPLIT_SM90 = "flashcore/fast/kernels/split_kv_sm90.py"
SPLIT_KV = "flashcore/fast/kernels/split_kv.py"
APPEND = "flashcore/fast/kernels/append.py"
WRAPPER = "flashcore/fast/attention_production.py"
TUNING = "flashcore/fast/tuning.py"
CACHE = "flashcore/cache.py"
RELAUNCH = "flashcore/fast/relaunch.py"
VALIDATION = "flashcore/validation.py"
ASSERTIONS = "properties/assertions.py"
RUNNER = "properties/runner.py"


class AnchorError(ValueError):
    """The text that a mutant changes is not in the source exactly once: the mutant no longer means anything."""


@dataclass(frozen=True)
class Edit:
    """One replacement.

    Attributes:
        file: path from the root of the project.
        anchor: text that occurs there exactly once.
        replacement: what stands there instead.
    """

    file: str
    anchor: str
    replacement: str


@dataclass(frozen=True)
class Mutant:
    """A small change of the shipped source.

    Attributes:
        id: "M01"; those with M and W are the catalogue's, N change nothing that the contract promises.
        category: class of fault, "TAIL".
        change: what is different, in a sentence.
        where: the inputs on which it shows.
        edits: the change itself.
        laws: words of the laws that should see it, tried first; all the others follow.
        needs_gpu: why it cannot show in the interpreter; "" if it can.
        needs_kernel: of ``Subject.paths``, where it is not on every GPU.
        neutral: it must survive.
    """

    id: str
    category: str
    change: str
    where: str
    edits: tuple[Edit, ...]
    laws: tuple[str, ...] = ()
    needs_gpu: str = ""
    needs_kernel: str = ""
    neutral: bool = False

    @property
    def of_the_suite(self) -> bool:
        """Whether it is a fault of the suite's own code, which the tests of the suite have to see."""
        return any(not edit.file.startswith("flashcore/") for edit in self.edits)


def edited(mutant: Mutant, root: Path = ROOT) -> dict[str, str]:
    """The files that a mutant changes, by path, with their new text.

    Raises:
        AnchorError: an anchor is not found exactly once.
    """
    texts: dict[str, str] = {}
    for edit in mutant.edits:
        text = texts.get(edit.file) or (root / edit.file).read_text()
        found = text.count(edit.anchor)
        if found != 1:
            first = edit.anchor.strip().splitlines()[0]
            raise AnchorError(f"{mutant.id}: an anchor must be found once in {edit.file}, got {found} times: {first}")
        texts[edit.file] = text.replace(edit.anchor, edit.replacement)
    return texts


def write_mutated(mutant: Mutant, folder: Path, root: Path = ROOT) -> None:
    """Put a mutated copy of the package ``flashcore`` (for faults of the suite, of everything) into ``folder``.

    Raises:
        AnchorError: an anchor is not found exactly once.
    """
    texts = edited(mutant, root)
    packages = ["flashcore"]
    if mutant.of_the_suite:
        packages += ["properties", "references", "tests"]
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy(root / name, folder / name)
    for package in packages:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in texts.items():
        (folder / name).write_text(text)
