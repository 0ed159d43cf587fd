"""Three acceptance rules in common use, re-implemented from their statements, to run beside the oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from properties.numerics.families import Float64Array, Problem
from references.rounding import Format, round_to


@dataclass(frozen=True)
class Compared:
    """What such a rule looks at: [num_q_heads, q_len, head_dim] each."""

    out: Float64Array
    reference: Float64Array
    eager: Float64Array


def eager_attention(problem: Problem, fmt: Format) -> Float64Array:
    """Unfused attention with every intermediate stored in the input format, as an eager framework runs it.

    Products accumulate in more precision than the format, softmax works in float32 inside; what is stored
    between the operations (scores, scaled scores, P, out) is rounded.
    """
    group_size = len(problem.query) // len(problem.key)
    key = np.repeat(problem.key, group_size, axis=0)
    value = np.repeat(problem.value, group_size, axis=0)
    scores = round_to(problem.query @ key.swapaxes(1, 2), fmt)
    logits = np.where(problem.visible, round_to(scores * problem.scale, fmt), -np.inf)
    peak = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    weight = np.exp(logits - np.where(peak == -np.inf, 0.0, peak))
    p = round_to(weight / np.maximum(weight.sum(axis=-1, keepdims=True), 1e-300), fmt)
    return round_to(p @ value, fmt)


def _within_twice_eager(c: Compared) -> bool:
    return bool(_largest(c.out - c.reference) <= 2 * _largest(c.eager - c.reference) + 1e-5)


def _within_atol(c: Compared) -> bool:
    return bool(_largest(c.out - c.reference) <= 1e-2)


def _allclose(c: Compared) -> bool:
    return bool(np.allclose(c.out, c.reference, rtol=1e-2, atol=1e-2))


def _largest(error: Float64Array) -> float:
    return float(np.max(np.where(np.isnan(error), np.inf, np.abs(error)), initial=0.0))


# True: the rule accepts the output.
RIVALS: dict[str, Callable[[Compared], bool]] = {
    "2 x eager + 1e-5": _within_twice_eager,
    "atol 1e-2": _within_atol,
    "allclose 1e-2": _allclose,
}
