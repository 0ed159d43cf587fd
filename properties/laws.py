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
from properties.needs import Need, asked_by


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: of the test, without "test_"; unique.
        check: raises if the law does not hold on a case.
        cases: the strategy that draws them.
        sentence: first line of the docstring, or the name in words.
        asks: what a kernel must meet to owe it, as the test declares with ``properties.needs.asks``.
    """

    name: str
    check: Callable[[Case], None]
    cases: SearchStrategy[Case]
    sentence: str
    asks: frozenset[Need] = frozenset()


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
    return Law(name, handle.inner_test, strategies["case"], sentence, asked_by(test))


def owed(found: dict[str, Law], meets: Callable[[Need], bool]) -> tuple[dict[str, Law], dict[str, str]]:
    """The laws whose needs a kernel meets, and for each of the others what it lacks, in words."""
    lacking = {name: ", ".join(sorted(need for need in law.asks if not meets(need))) for name, law in found.items()}
    return {name: found[name] for name, lacks in lacking.items() if not lacks}, {n: w for n, w in lacking.items() if w}


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
