"""For which inputs every intermediate of a kernel is finite, so that a result that is not is a failure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from references.arithmetic_model import ArithmeticModel
from references.rounding import Format, as_format
from references.rounding_errors import Arithmetic, gamma
from references.weight_errors import LOG2_E, lifted_magnitude

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

CLASSES = ("input", "score", "logit", "contraction", "numerator", "output")


def non_finite(
    query: Float64Array, key: Float64Array, value: Float64Array, rows: BoolArray
) -> tuple[BoolArray | None, BoolArray | None, tuple[Float64Array, Float64Array, Float64Array]]:
    """Which results a non-finite input reaches, and the inputs with zeros in its place.

    Args:
        query: [num_kv_heads, rows, head_dim]
        key: [num_kv_heads, kv_len, head_dim]
        value: [num_kv_heads, kv_len, head_dim]
        rows: [rows, kv_len], which keys a row sees.

    Returns:
        Of the output [num_kv_heads, rows, head_dim] and of the log-sum-exp [num_kv_heads, rows]; None, None
        if all inputs are finite.
    """
    inputs = (query, key, value)
    # A sum is finite only if all its terms are, and needs no array of its own.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = all(np.isfinite(x.sum()) for x in inputs)
    if finite or all(np.isfinite(x).all() for x in inputs):
        return None, None, inputs
    bad_query, bad_key, bad_value = (np.where(np.isfinite(x), 0.0, 1.0) for x in inputs)
    sees = rows.astype(np.float64)
    through_key = (sees @ bad_key.sum(axis=-1, keepdims=True))[..., 0]
    through_query = bad_query.sum(axis=-1) * sees.sum(axis=-1)
    scores = through_key + through_query > 0
    out = scores[..., None] | (sees @ bad_value > 0)
    query, key, value = (np.where(np.isfinite(x), x, 0.0) for x in inputs)
    return out, scores, (query, key, value)


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
    fmt = as_format(fmt)
    num_q_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[0]
    group_size = num_q_heads // num_kv_heads
    rows = np.tile(visible, (group_size, 1))
    query = query.reshape(num_kv_heads, group_size * q_len, head_dim)
    unbounded, _, (query, key, value) = non_finite(query, key, value, rows)
    arithmetic = Arithmetic(model, fmt, head_dim, None)
    largest = model.work.max_finite
    count = rows.sum(axis=-1)
    theta = model.scale_error + 2.0**-20

    with np.errstate(over="ignore", invalid="ignore"):
        sizes = lifted_magnitude(key, fmt, arithmetic.fused).swapaxes(-1, -2)
        score = lifted_magnitude(query, fmt, arithmetic.fused) @ sizes
        score = np.max(np.where(rows, score, 0.0), axis=-1, initial=0.0) * (1 + arithmetic.score())
        logit = np.where(score > 0, score * abs(scale) * LOG2_E * (1 + theta), 0.0)
        # Each tile may hold one key only: its term passes every addition, rescaling and merge.
        roundings = 4 * count + 8
        sums = arithmetic.fused_steps(count) if arithmetic.fused else np.zeros(count.shape)
        growth = (1 + sums) * (1 + gamma(roundings, arithmetic.u)) * (2.0 if model.contraction else 1.0)
        if arithmetic.rounds_p:
            p_format, mode = model.format_of_p(fmt), model.p_rounding
            growth *= 1 + p_format.unit_roundoff(mode) + count * p_format.underflow_error(mode)
        shrinking = np.maximum(1 - gamma(roundings, arithmetic.u), 0.0)
        magnitude = np.abs(value)
        total = rows.astype(np.float64) @ magnitude
        numerator = (total * growth[:, None]).max(axis=-1, initial=0.0)
        # A quotient of weighted sums is at most the largest value, apart from the errors of the two sums.
        hull = np.zeros(total.shape[:2])
        for row in range(rows.shape[0]):
            hull[:, row] = np.max(magnitude[:, rows[row]], axis=(-2, -1), initial=0.0)
        spread = growth / (2.0 if model.contraction else 1.0) / shrinking
        output = hull * spread * (1 + model.division_error) * (1 + 2.0**-20)
        constant = abs(scale) * LOG2_E * (1 + theta)
        finite = {
            "input": np.ones(score.shape, dtype=np.bool_) if unbounded is None else ~unbounded.any(axis=-1),
            "score": score < largest / 4,
            "logit": (logit < largest / 4) & (constant < largest),
            "contraction": (logit * arithmetic.u * 2 <= 1) | (not model.contraction),
            "numerator": numerator < largest / 2,
            "output": output <= fmt.max_finite,
        }
    shape = (num_q_heads, q_len)
    return {name: (~ok & (count > 0)).reshape(shape) for name, ok in finite.items()}


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
    free = np.ones(query.shape[:2], dtype=np.bool_)
    for name in CLASSES:
        free &= ~classes[name]
    return free
