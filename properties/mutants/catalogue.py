"""All mutants."""

from __future__ import annotations

from collections.abc import Sequence

from properties.mutants import (
    append,
    arguments,
    causal,
    comparison,
    decode,
    edges,
    empty,
    gqa,
    hopper,
    layout,
    neutral,
    numeric,
    offsets,
    poison,
    precision,
    reading,
    refusals,
    repeats,
    sharing,
    split,
    state,
    tail,
    unseen,
)
from properties.mutants.mutant import Mutant

ALL: tuple[Mutant, ...] = (
    *tail.MUTANTS,
    *causal.MUTANTS,
    *empty.MUTANTS,
    *split.MUTANTS,
    *sharing.MUTANTS,
    *gqa.MUTANTS,
    *numeric.MUTANTS,
    *precision.MUTANTS,
    *append.MUTANTS,
    *decode.MUTANTS,
    *state.MUTANTS,
    *unseen.MUTANTS,
    *layout.MUTANTS,
    *poison.MUTANTS,
    *arguments.MUTANTS,
    *repeats.MUTANTS,
    *offsets.MUTANTS,
    *hopper.MUTANTS,
    *edges.MUTANTS,
    *refusals.MUTANTS,
    *reading.MUTANTS,
    *comparison.MUTANTS,
    *neutral.MUTANTS,
)


def select(ids: Sequence[str] = (), category: str | None = None, *, one_a_class: bool = False) -> list[Mutant]:
    """The mutants asked for; all by default.

    Args:
        ids: their ids.
        category: only this class.
        one_a_class: the first of each class that shows on any machine, and no neutral one.

    Raises:
        ValueError: there is no such id or class.
    """
    known = {mutant.id: mutant for mutant in ALL}
    for unknown in (i for i in ids if i not in known):
        raise ValueError(f"--id must name a mutant, got {unknown}; there are {', '.join(known)}")
    categories = sorted({mutant.category for mutant in ALL})
    if category is not None and category not in categories:
        raise ValueError(f"--class must be one of {', '.join(categories)}, got {category}")
    chosen = [m for m in ALL if (not ids or m.id in ids) and category in (None, m.category)]
    if one_a_class:
        runnable = [m for m in chosen if not m.neutral and not m.needs_gpu]
        chosen = list({m.category: m for m in reversed(runnable)}.values())[::-1]
    return chosen
