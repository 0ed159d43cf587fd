"""How far a correct kernel may be from the exact result: one number for every output element.

The derivation, term by term, is in docs/numerics.md; the equation numbers below are those of its sections.
Everything is a bound, nothing is an estimate, and no higher-order part is dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.alarm import by_gap
from references.arithmetic_model import ArithmeticModel
from references.budget_terms import LSE_TERMS, TERMS, Problem, lse_terms, out_terms
from references.centred import Centred
from references.overflow import non_finite, surely_finite
from references.overflow import overflow_free as overflow_free
from references.rounding import Format, as_format
from references.rounding_errors import arithmetic_of
from references.softmax import Sequences, magnitudes_of, softmax_of
from references.tiling import Tiles, counts, layout
from references.tiling import tiling as tiling
from references.weight_errors import deviations_of

__all__ = [
    "LSE_TERMS", "ORACLE_SHARE", "TERMS", "Budget", "Sequence", "budget", "budgets", "overflow_free", "tiling",
]  # fmt: skip

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# The oracle's own error, as a share of the budget; tests/test_reference_trust.py asserts that it is.
ORACLE_SHARE = 2.0**-20

# Elements of the arrays [rows, kv_len] of sequences that are worked on together.
TOGETHER = 1 << 16


@dataclass(frozen=True)
class Budget:
    """Error budgets and what they consist of.

    A budget of 0 is met by the exact value only. NaN means that there is no bound, because a non-finite input
    is visible or the logits overflow even float64.

    Attributes:
        out: [num_q_heads, q_len, head_dim]
        lse: [num_q_heads, q_len]
        overflow_free: [num_q_heads, q_len], see ``overflow.overflow_free``.
        parts: [terms, num_kv_heads, rows, head_dim], what ``out`` consists of; a row is a query of a head of a group.
        lse_parts: [lse terms, num_kv_heads, rows]
    """

    out: Float64Array
    lse: Float64Array
    overflow_free: BoolArray
    parts: Float64Array
    lse_parts: Float64Array

    @property
    def by_term(self) -> Float64Array:
        """[terms, num_q_heads, q_len, head_dim]"""
        return self.parts.reshape(len(TERMS), *self.out.shape)

    @property
    def lse_by_term(self) -> Float64Array:
        """[lse terms, num_q_heads, q_len]"""
        return self.lse_parts.reshape(len(LSE_TERMS), *self.lse.shape)

    @property
    def terms(self) -> dict[str, Float64Array]:
        """By name, arrays like ``out`` that add up to it."""
        return dict(zip(TERMS, self.by_term, strict=True))

    @property
    def lse_terms(self) -> dict[str, Float64Array]:
        """By name, arrays like ``lse`` that add up to it."""
        return dict(zip(LSE_TERMS, self.lse_by_term, strict=True))


@dataclass(frozen=True)
class Sequence:
    """What one sequence attends to.

    Attributes:
        query: [num_q_heads, q_len, head_dim], values of the input format.
        key: [num_kv_heads, kv_len, head_dim]
        value: [num_kv_heads, kv_len, head_dim]
        visible: [q_len, kv_len], which keys a query sees.
        tiles: the order in which the kernel visits the keys, see ``tiling``.
    """

    query: Float64Array
    key: Float64Array
    value: Float64Array
    visible: BoolArray
    tiles: Tiles

    def __post_init__(self) -> None:
        """Refuse a mask of another shape."""
        expected = (self.query.shape[1], self.key.shape[1])
        if self.visible.shape != expected:
            raise ValueError(f"visible must have the shape {expected}, got {self.visible.shape}")


def budget(
    query: Float64Array,
    key: Float64Array,
    value: Float64Array,
    visible: BoolArray,
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
    tiles: Tiles,
    alarm_lambda: float | None = None,
) -> Budget:
    """How far the results of one sequence may be from those of ``attention.attention``; see ``budgets``."""
    sequence = Sequence(query, key, value, visible, tiles)
    return budgets([sequence], scale=scale, fmt=fmt, model=model, alarm_lambda=alarm_lambda)[0]


def budgets(
    sequences: Iterable[Sequence],
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
    alarm_lambda: float | None = None,
) -> list[Budget]:
    """How far the results of sequences with the same heads and head_dim may be from those of ``attention.attention``.

    Small sequences are worked on together, because most of the cost of each would be that of calling NumPy.

    Args:
        sequences: what attends to what, and in which order.
        scale: multiplies the logits.
        fmt: format of the inputs and of the output.
        model: the arithmetic of the kernel.
        alarm_lambda: None for the gate, which a correct kernel never exceeds. A number for the alarm: errors
            that are independent from key to key are added as the root of their squares, times this number;
            never above the gate.

    Returns:
        Budgets and their terms. A query that sees no key has budget 0: its results are exact.
    """
    fmt = as_format(fmt)
    found: dict[int, Budget] = {}
    waiting: list[tuple[int, Sequence]] = []
    rows = longest = 0

    def work() -> None:
        if waiting:
            together = [sequence for _, sequence in waiting]
            for (index, _), result in zip(waiting, _budgets(together, scale, fmt, model, alarm_lambda), strict=True):
                found[index] = result
            waiting.clear()

    for index, sequence in enumerate(sequences):
        num_q_heads, q_len, _ = sequence.query.shape
        kv_len = sequence.key.shape[1]
        if q_len == 0 or kv_len == 0:
            found[index] = _nothing((num_q_heads, q_len), sequence.value.shape[-1])
            continue
        if waiting and (rows + num_q_heads * q_len) * max(longest, kv_len) > TOGETHER:
            work()
        if not waiting:
            rows = longest = 0
        waiting.append((index, sequence))
        rows, longest = rows + num_q_heads * q_len, max(longest, kv_len)
    work()
    return [found[index] for index in sorted(found)]


def _sequences(several: list[Sequence]) -> Sequences:
    """Several sequences with the same heads and head_dim as one array each."""
    num_q_heads, _, head_dim = several[0].query.shape
    num_kv_heads = several[0].key.shape[0]
    group_size = num_q_heads // num_kv_heads
    queries = [one.query.reshape(num_kv_heads, -1, head_dim) for one in several]
    return Sequences(
        query=_joined(queries),
        key=_joined([one.key for one in several]),
        value=_joined([one.value for one in several]),
        rows=_spans(queries),
        keys=_spans([one.key for one in several]),
        visible=[one.visible if group_size == 1 else np.tile(one.visible, (group_size, 1)) for one in several],
    )


def _joined(arrays: list[Float64Array]) -> Float64Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)


def _spans(arrays: list[Float64Array]) -> list[slice]:
    ends = list(itertools.accumulate(x.shape[1] for x in arrays))
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _budgets(
    several: list[Sequence], scale: float, fmt: Format, model: ArithmeticModel, alarm_lambda: float | None
) -> list[Budget]:
    """The budgets of sequences that have queries and keys."""
    together = _sequences(several)
    arithmetic = arithmetic_of(model, fmt, together.query.shape[-1])
    unbounded: list[tuple[BoolArray | None, BoolArray | None]] = [(None, None)] * len(several)
    # Logits that are not finite in float64 have no bound; overflow_free says so too.
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = magnitudes_of(together, fmt, arithmetic.fused)
        finite = surely_finite(sizes.largest, together.kv_len, scale, arithmetic)
        if not all(map(math.isfinite, sizes.largest)):
            cleaned = [non_finite(one.query, one.key, one.value, one.visible) for one in several]
            unbounded = [(out, lse) for out, lse, _ in cleaned]
            inputs = zip(several, (clean for _, _, clean in cleaned), strict=True)
            together = _sequences([Sequence(*clean, one.visible, one.tiles) for one, clean in inputs])
            sizes = magnitudes_of(together, fmt, arithmetic.fused)
        exact = softmax_of(together, scale)
        tiles = [layout(one.tiles, one.key.shape[1]) for one in several]
        step = arithmetic.products_per_step if arithmetic.fused else 1
        seen = counts(together.visible, tiles, step)
        (out,) = together.sums(together.value, exact.power)
        out /= exact.total[..., None]
        centred = Centred(together, out)
        problem = Problem(together, exact, sizes, out, np.abs(out), centred, seen)
        deviations = deviations_of(together, exact, sizes, scale, arithmetic, seen, tiles)
        terms, total, share_sum = out_terms(problem, deviations, arithmetic)
        of_lse, lse_total = lse_terms(problem, deviations, share_sum, arithmetic)
        if alarm_lambda is not None:
            arithmetic = arithmetic_of(model, fmt, arithmetic.head_dim, alarm_lambda)
            deviations = deviations_of(together, exact, sizes, scale, arithmetic, seen, tiles)
            keys = by_gap(exact)
            likely, likely_total, share_sum = out_terms(problem, deviations, arithmetic, keys)
            _take_smaller(terms, total, likely, likely_total)
            _take_smaller(of_lse, lse_total, *lse_terms(problem, deviations, share_sum, arithmetic, keys))

    for parts, sum_of_parts in ((terms, total), (of_lse, lse_total)):
        np.multiply(sum_of_parts, ORACLE_SHARE, out=parts[-1])
        sum_of_parts += parts[-1]
        if exact.blind is not None:
            parts[:, :, exact.blind] = 0.0
            sum_of_parts[:, exact.blind] = 0.0
    found = []
    for one, rows, (bad, lse_bad) in zip(several, together.rows, unbounded, strict=True):
        shape = one.query.shape[:2]
        out, lse = total[:, rows].reshape(*shape, -1), lse_total[:, rows].reshape(shape)
        parts, lse_parts = terms[:, :, rows], of_lse[:, :, rows]
        for allowed, its_parts, where in ((out, parts, bad), (lse, lse_parts, lse_bad)):
            if where is not None:
                allowed[where] = np.nan
                its_parts[:, where.reshape(its_parts.shape[1:])] = np.nan
        if finite or surely_finite(_largest(one), one.key.shape[1], scale, arithmetic):
            free = np.ones(shape, np.bool_)
        else:
            free = overflow_free(one.query, one.key, one.value, one.visible, scale=scale, fmt=fmt, model=model)
        found.append(Budget(out, lse, free, parts, lse_parts))
    return found


def _largest(one: Sequence) -> tuple[float, float, float]:
    query, key, value = (float(np.abs(x).max()) for x in (one.query, one.key, one.value))
    return query, key, value


def _nothing(shape: tuple[int, int], head_dim: int) -> Budget:
    """The budget of queries that see no key."""
    parts, lse_parts = np.zeros((len(TERMS), *shape, head_dim)), np.zeros((len(LSE_TERMS), *shape))
    return Budget(parts[0], lse_parts[0], np.ones(shape, np.bool_), parts, lse_parts)


def _take_smaller(gate: Float64Array, gate_total: Float64Array, alarm: Float64Array, alarm_total: Float64Array) -> None:
    """Take the terms [terms, ...] of whichever budget is smaller, element by element."""
    smaller = alarm_total < gate_total
    np.copyto(gate, alarm, where=smaller)
    np.copyto(gate_total, alarm_total, where=smaller)
