"""``python -m properties subjects``: what can be put under test, what each offers, and what some do."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from properties import capabilities, device, laws, subjects
from properties.capabilities import EVERYTHING, Capabilities
from properties.case import DTYPES, MAX_HEAD_DIM, MAX_HEADS
from properties.subjects.observing import observe

_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
WIDTH = 154


def show(names: Sequence[str], console: Console | None = None) -> None:
    """Print the table of all subjects, or all that is known of some.

    Raises:
        SubjectError: a name is none.
    """
    console = Console(width=WIDTH, highlight=False) if console is None else console
    if names:
        for name in names:
            _print_one(console, name, *_known(name))
        return
    table = Table(
        "subject", "installed", "runs on", "dtypes", "head_dim", "groups", "causal", "rows", "cache", "lse", "laws owed"
    )
    owed_by_all = laws.discover()
    for name in (subjects.DEFAULT, *subjects.ADAPTERS):
        offered, missing = _known(name)
        owed, _ = laws.owed(owed_by_all, offered.meets)
        dtypes = " ".join(_SHORT[dtype] for dtype in DTYPES if dtype in offered.dtypes)
        table.add_row(
            name,
            "no" if missing else "yes",
            " ".join(offered.devices),
            dtypes,
            _numbers(offered.head_dims, MAX_HEAD_DIM),
            _numbers(offered.groups, MAX_HEADS),
            _causal(offered),
            "ragged" if offered.ragged else "alike",
            offered.cache if "attention_with_kv_cache" in offered.ops else "no such call",
            "yes" if offered.lse else "no",
            f"{len(owed)} of {len(owed_by_all)}",
        )
    console.print(table)
    console.print(
        "Anything else: --subject package.module:name, a function or an Adapter (properties/subjects/adapter.py)."
    )


def show_observed(names: Sequence[str], console: Console | None = None) -> None:
    """Call some adapters, and print what they do where kernels differ.

    Raises:
        SubjectError: a name is none that can be used here.
    """
    console = Console(width=WIDTH, highlight=False) if console is None else console
    for name in names:
        table = Table("what", "observed", title=f"{name}, on {device.current()}", title_justify="left")
        for matter, seen in observe(subjects.adapter_of(name)).items():
            table.add_row(matter, seen)
        console.print(table)


def _known(name: str) -> tuple[Capabilities, list[str]]:
    """What a subject offers, and the packages it needs that are not installed."""
    if name == subjects.DEFAULT:
        return EVERYTHING, []
    found = subjects.find(name)
    if isinstance(found, type):
        return found.capabilities, found.missing()  # type: ignore[attr-defined]  # an Adapter, as load would say
    return subjects.load(name).capabilities, []


def _numbers(offered: Sequence[int], most: int) -> str:
    if isinstance(offered, range):
        by = f" by {offered.step}" * (offered.step > 1)
        return "any" if offered == range(1, most + 1) else f"{offered[0]}-{offered[-1]}{by}"
    return " ".join(map(str, offered))


def _causal(offered: Capabilities) -> str:
    masks = "/".join({True: "yes", False: "no"}[mask] for mask in offered.masks)
    return masks if offered.alignment == "bottom-right" else f"{masks}, square"


def _print_one(console: Console, name: str, offered: Capabilities, missing: list[str]) -> None:
    needs = f"needs {', '.join(missing)}, not installed" if missing else "installed"
    table = Table("what", "offered", "basis", "source", title=f"{name}: {needs}", title_justify="left")
    for field in vars(offered):
        if field != "policies":
            value = getattr(offered, field)
            text = _numbers(value, value[-1]) if field in ("head_dims", "groups") else _words(value)
            table.add_row(field, text)
    for topic in capabilities.TOPICS:
        if offered.policies is None:
            table.add_row(topic, "as the contract says", "documented", "docs/contract.md")
        elif topic in offered.policies:
            policy = offered.policies[topic]
            table.add_row(topic, policy.what, policy.basis, policy.source)
        else:
            table.add_row(topic, "not known", "undefined")
    console.print(table)


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_words, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
