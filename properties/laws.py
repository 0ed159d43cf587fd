"""The laws: Hypothesis tests at module level of ``properties/test_*.py`` that take exactly one argument, ``case``.

Whatever else a law needs it derives from the case, so a stored case replays it without Hypothesis.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy

from properties.case import Case
from references.arithmetic_model import PERMISSIVE, ArithmeticModel


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: of the test, without "test_"; unique.
        check: raises if the law does not hold on a case.
        cases: the strategy that draws them.
        sentence: first line of the docstring, or the name in words.
        is_exact: it asks for bits that only a kernel of declared arithmetic owes: those of the lattice, where weights
            2^-k are exact for exponentials in base 2 and sums divided last, and those of sums with one more zero.
    """

    name: str
    check: Callable[[Case], None]
    cases: SearchStrategy[Case]
    sentence: str
    is_exact: bool = False


class UnknownLaw(ValueError):
    """No law has the name asked for."""


def discover(folder: Path | None = None, package: str = "properties") -> dict[str, Law]:
    """All laws by name, in the order of files and lines."""
    folder = Path(__file__).parent if folder is None else folder
    found: dict[str, Law] = {}
    for path in sorted(folder.glob("test_*.py")):
        module = importlib.import_module(f"{package}.{path.stem}")
        for name, test in vars(module).items():
            handle = getattr(test, "hypothesis", None)
            if not name.startswith("test_") or handle is None or test.__module__ != module.__name__:
                continue
            law = _law(name.removeprefix("test_"), test, handle)
            if law.name in found:
                raise ValueError(f"the name of a law must be unique, got {law.name} twice")
            found[law.name] = law
    return found


def _law(name: str, test: Any, handle: Any) -> Law:
    strategies = dict(handle._given_kwargs)
    if list(strategies) != ["case"]:
        raise ValueError(f"a law must take one argument, case, got {name}({', '.join(strategies)})")
    sentence = (test.__doc__ or name.replace("_", " ")).strip().splitlines()[0]
    is_exact = "on_the_lattice" in handle.inner_test.__code__.co_names or "changes_no_bit" in name
    return Law(name, handle.inner_test, strategies["case"], sentence, is_exact)


def owed(found: dict[str, Law], model: ArithmeticModel) -> dict[str, Law]:
    """The laws that a kernel of this arithmetic owes: not those of bits on the lattice if nothing is known of it."""
    return {name: law for name, law in found.items() if model != PERMISSIVE or not law.is_exact}


def select_names(names: Sequence[str], wanted: str | None) -> list[str]:
    """The laws whose name contains ``wanted``; an exact name means only that one.

    Raises:
        UnknownLaw: there is none.
    """
    if wanted is None:
        return list(names)
    wanted = name_of(wanted)
    if wanted in names:
        return [wanted]
    chosen = [name for name in names if wanted in name]
    if not chosen:
        raise UnknownLaw(f"--law must name a law, got {wanted!r}; there are: {', '.join(names) or 'none'}")
    return chosen


def name_of(law_id: str) -> str:
    """The name of a law from what a file or a user calls it: "module::test_name", "test_name" or "name"."""
    return law_id.rpartition("::")[2].removeprefix("test_")
