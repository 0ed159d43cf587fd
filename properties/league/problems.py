"""Equal problems for all: one call each, of the sizes and options that nearly every kernel takes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from properties import capabilities
from properties.capabilities import Capabilities, NotOffered
from properties.case import Case, Row
from properties.strategies import cases

ROOT = Path(__file__).parents[2]
# Where results need rounding, with logits of ordinary size and of hundreds, falling, rising and nearly equal.
FAMILIES = (
    "normal",
    "negative_logits",
    "large_logits",
    "score_range",
    "rising",
    "falling",
    "near_ties",
    "dynamic_range",
)
# What nearly every subject takes, but for the dtypes and the mask.
COMMON = Capabilities(
    ops=("attention_with_kv_cache",),
    head_dims=range(8, 257, 8),
    scales="default",
    ragged=False,
    padding=False,
    overflow=False,
    growth=False,
    peeks=False,
    forks=False,
    rollbacks=False,
    tiles=False,
    layouts=("contiguous",),
    empty=False,
    blind=False,
)


def draw(count: int, seed: int) -> list[Case]:
    """As many different problems in float32, the same for the same arguments and revision of this suite.

    In a process of its own: what Hypothesis draws depends on the constants in the modules that are loaded.
    """
    command = [sys.executable, "-m", __name__, str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return [Case.from_json(line) for line in done.stdout.splitlines()]


def _draw(count: int, seed: int) -> list[Case]:
    drawn: dict[Case, None] = {}
    profile = settings(
        max_examples=2 * count,
        database=None,
        derandomize=False,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @hypothesis.seed(seed)
    @profile
    @given(case=cases(size="small", families=FAMILIES, dtypes=("float32",), max_steps=1))
    def collect(case: Case) -> None:
        drawn[case] = None

    capabilities.use(COMMON)
    collect()
    return list(drawn)[:count]


def rounded_to(dtype: str, case: Case) -> Case:
    """The problem in another dtype."""
    fields: dict[str, Any] = {"dtype": dtype}
    return replace(case, **fields)


def fingerprint(drawn: Sequence[Case]) -> str:
    """Names a list of problems: results are compared only where it is the same."""
    return hashlib.sha256("\n".join(case.to_json() for case in drawn).encode()).hexdigest()[:16]


def admitted(case: Case, offered: Capabilities) -> Case:
    """The problem as a kernel takes it: without a cache if it has none. The numbers are the same.

    Raises:
        NotOffered: it does not take it.
    """
    try:
        offered.require(case)
    except NotOffered:
        case = without_cache(case)
        offered.require(case)
    return case


def without_cache(case: Case) -> Case:
    """All keys of the one call at once."""
    rows = tuple(Row(row.cached + row.new[0], row.new, row.uid) for row in case.rows)
    defaults = Case()
    return replace(case, rows=rows, op="attention", **{n: getattr(defaults, n) for n in ("start", "capacity")})


if __name__ == "__main__":
    for problem in _draw(*map(int, sys.argv[1:])):
        print(problem.to_json())
