"""Results of a schedule read token by token, so that schedules of the same tokens can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from properties.assertions import Expected, Got, LawViolation, assert_close, assert_same_bits, describe
from properties.checking import expected_outputs
from properties.runner import Run


def assert_same_sequences(first: Run, second: Run, what: str) -> None:
    """Every token's query gave the same bits in two runs that bring the same tokens in other steps."""
    for one, other in zip(_by_row(first, first.outputs), _by_row(second, second.outputs), strict=True):
        if one.out.size:
            assert_same_bits(one, other, what)


def assert_close_sequences(first: Run, second: Run, what: str) -> None:
    """The same within the sum of both budgets."""
    sides = []
    for made in (first, second):
        pairs = expected_outputs(made)
        rows = _by_row(made, [got for got, _ in pairs])
        sides.append(list(zip(rows, _budgets_by_row(made, [expected for _, expected in pairs]), strict=True)))
    for (one, one_allowed), (other, other_allowed) in zip(*sides, strict=True):
        assert_close(one, other, (one_allowed, other_allowed), what)


def assert_same_caches(first: Run, second: Run) -> None:
    """The caches that two runs end with hold the same bits in the slots of their tokens, as many in both."""
    first.outputs, second.outputs  # noqa: B018 - a call that should have returned did
    one, other = first.steps[-1], second.steps[-1]
    case = first.case
    if one.plan.kv_lens != other.plan.kv_lens:
        raise ValueError(f"both runs must end with the same lengths, got {one.plan.kv_lens}, {other.plan.kv_lens}")
    for name in ("k_bits", "v_bits"):
        for b, length in enumerate(one.plan.kv_lens):
            held = [getattr(step, name)[b, :, :length] for step in (one, other)]
            wrong = np.argwhere(held[0] != held[1])
            if len(wrong):
                h, slot, d = (int(i) for i in wrong[0])
                report = (
                    f"{name[0]}_cache differs between two ways to fill it in {len(wrong)} elements of row {b}\n"
                    f"  first at [head={h}, slot={slot}, d={d}]\n  case: {describe(case)}"
                )
                raise LawViolation("two caches", report, case)


def _by_row(made: Run, outputs: Sequence[Got]) -> list[Got]:
    """The outputs of each row's real queries, in the order of its tokens."""
    return [
        replace(
            outputs[0],
            out=np.concatenate([got.out[b : b + 1, :, :n] for got, n in _real(made, outputs, b)], axis=2),
            lse=np.concatenate([got.lse[b : b + 1, :, :n] for got, n in _real(made, outputs, b)], axis=2),
            places=(np.array([b]), outputs[0].places[1], np.arange(sum(n for _, n in _real(made, outputs, b)))),
            is_transformed=True,
        )
        for b in range(made.case.batch)
    ]


def _real(made: Run, outputs: Sequence[Any], b: int) -> list[tuple[Any, int]]:
    lengths = [step.plan.new_lens[b] for step in made.steps]
    return list(zip(outputs, lengths, strict=True))


def _budgets_by_row(made: Run, expected: Sequence[Expected]) -> list[Expected]:
    rows = []
    for b in range(made.case.batch):
        arrays: dict[str, Any] = {
            f.name: np.concatenate([getattr(e, f.name)[b : b + 1, :, :n] for e, n in _real(made, expected, b)], axis=2)
            for f in fields(Expected)
            if not f.name.endswith("terms")
        }
        rows.append(Expected(**arrays))
    return rows
