"""For which inputs every intermediate of a kernel is finite, so that a result that is not is a failure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from references.arithmetic_model import ArithmeticModel
from references.rounding import FLOAT64, Format, as_format
from references.rounding_errors import Arithmetic, arithmetic_of, gamma
from references.softmax import LOG2_E, lifted_magnitude
from references.tiling import Count

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

CLASSES = ("input", "score", "logit", "contraction", "numerator", "output")


def non_finite(
    query: Float64Array, key: Float64Array, value: Float64Array, visible: BoolArray
) -> tuple[BoolArray | None, BoolArray | None, tuple[Float64Array, Float64Array, Float64Array]]:
    """Which results a non-finite input reaches, and the inputs with zeros in its place; arguments as in ``budget``.

    Returns:
        Of the output [num_q_heads, q_len, head_dim] and of the log-sum-exp [num_q_heads, q_len]; None, None
        if all inputs are finite.
    """
    inputs = (query, key, value)
    if all(np.isfinite(x).all() for x in inputs):
        return None, None, inputs
    bad_query, bad_key, bad_value = (np.where(np.isfinite(x), 0.0, 1.0) for x in inputs)
    group_size = len(query) // len(key)
    bad_key, bad_value = (np.repeat(x, group_size, axis=0) for x in (bad_key, bad_value))
    sees = visible.astype(np.float64)
    scores = sees @ bad_key.sum(axis=-1)[..., None] + (bad_query.sum(axis=-1) * sees.sum(axis=-1))[..., None] > 0
    out = scores | (sees @ bad_value > 0)
    query, key, value = (np.where(np.isfinite(x), x, 0.0) for x in inputs)
    return out, scores[..., 0], (query, key, value)


def surely_finite(
    score: float, numerator: float, output: float, kv_len: int, scale: float, arithmetic: Arithmetic
) -> bool:
    """Whether no query can leave the range, judged by bounds of the sizes of all scores, sums of values and values.

    The conditions are those of ``overflow_classes`` for a query that sees all keys and meets all these at once; where
    they fail, the classes decide.
    """
    growth, spread = growths(kv_len, arithmetic)
    sizes = score * (1 + arithmetic.score), scale, numerator * growth, output * spread
    return all(map(math.isfinite, sizes)) and all(fits(*sizes, arithmetic).values())


def growths(count: Count, arithmetic: Arithmetic) -> tuple[Any, Any]:
    """How much larger than exact a sum of ``count`` terms p v, and a quotient of two such sums, can come out."""
    model = arithmetic.model
    # Each tile may hold one key only: its term passes every addition, rescaling and merge.
    roundings = 4 * count + 8
    growth: Any = (1 + (arithmetic.fused_steps(count) if arithmetic.fused else 0.0)) * (
        1 + gamma(roundings, arithmetic.u)
    )
    if arithmetic.rounds_p:
        p_format, mode = arithmetic.p_format, model.p_rounding
        growth = growth * (1 + p_format.unit_roundoff(mode) + count * p_format.underflow_error(mode))
    shrinking = 1 + gamma(2 * roundings, arithmetic.u) / 2  # 1 / (1 - gamma(roundings))
    spread = growth * shrinking * (1 + model.division_error) * (1 + 2.0**-20)
    return growth * (2.0 if model.contraction else 1.0), spread


def fits(score: Any, scale: float, numerator: Any, output: Any, arithmetic: Arithmetic) -> dict[str, Any]:
    """Which classes are ruled out by these sizes of scores, sums of p v and outputs: numbers, or arrays of them."""
    model, largest = arithmetic.model, arithmetic.model.work.max_finite
    constant = abs(scale) * LOG2_E * (1 + model.scale_error + 2.0**-20)
    # 0 times a constant that overflows is the constant's fault, not the score's.
    logit = score * min(constant, FLOAT64.max_finite)
    return {
        "score": score < largest / 4,
        "logit": (logit < largest / 4) & (constant < largest),
        "contraction": (logit * arithmetic.u * 2 <= 1) | (not model.contraction),
        "numerator": numerator < largest / 2,
        "output": output <= arithmetic.fmt.max_finite,
    }


def overflow_classes(
    query: Float64Array,
    key: Float64Array,
    value: Float64Array,
    visible: BoolArray,
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
) -> dict[str, BoolArray]:
    """Which queries may leave the range of a format, and where; arguments as in ``error_bounds.budget``.

    Returns:
        For each class an array [num_q_heads, q_len], True where it cannot be ruled out:

        input: a visible input is not finite.
        score: a partial sum of q.k overflows the accumulator.
        logit: the constant scale * log2(e), a logit, or the difference of two overflows.
        contraction: multiply and add are contracted, and the largest logit is so large that its rounding
            error is more than an octave: exp2(q.k * scale - max) is then not near 1 but anything up to
            infinity.
        numerator: a sum of p * v overflows although the mean does not, such as bfloat16 values near 1e38 with
            flat scores.
        output: the result is beyond, or within the error budget of, the largest value of the output format.
    """
    arithmetic = arithmetic_of(model, as_format(fmt), query.shape[-1])
    unbounded, _, (query, key, value) = non_finite(query, key, value, visible)
    group_size = len(query) // len(key)
    count = visible.sum(axis=-1)

    with np.errstate(over="ignore", invalid="ignore"):
        query_size, key_size = (lifted_magnitude(np.abs(x), arithmetic.fmt, arithmetic.fused) for x in (query, key))
        key_size, value_size = (np.repeat(x, group_size, axis=0) for x in (key_size, np.abs(value)))
        products = np.where(visible, query_size @ key_size.swapaxes(-1, -2), 0.0)
        score = products.max(axis=-1, initial=0.0) * (1 + arithmetic.score)
        # A quotient of weighted sums is at most the largest value, apart from the errors of the two sums.
        of_keys = value_size.max(axis=-1, initial=0.0)[:, None, :]
        hull = np.where(visible, of_keys, 0.0).max(axis=-1, initial=0.0)
        total = (visible.astype(np.float64) @ value_size).max(axis=-1, initial=0.0)
        growth, spread = growths(count, arithmetic)
        finite = fits(score, scale, total * growth, hull * spread, arithmetic)
    finite["input"] = np.ones(score.shape, dtype=np.bool_) if unbounded is None else ~unbounded.any(axis=-1)
    return {name: ~finite[name] & (count > 0) for name in CLASSES}


def overflow_free(
    query: Float64Array,
    key: Float64Array,
    value: Float64Array,
    visible: BoolArray,
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
) -> BoolArray:
    """[num_q_heads, q_len]: whether every intermediate is provably finite; see ``overflow_classes``."""
    classes = overflow_classes(query, key, value, visible, scale=scale, fmt=fmt, model=model)
    reached: BoolArray = np.logical_or.reduce(list(classes.values()))
    return ~reached
