"""The alarm's sums of squares against plain loops over groups of keys that err alike."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from references import alarm
from references.alarm import Alike, slack_of
from references.arithmetic_model import INTERPRETER
from references.attention import visible_keys
from references.error_bounds import budget, tiling
from references.rounding import BFLOAT16, FLOAT16, FLOAT32, Format
from references.softmax import Sequences, softmax_of
from tests.value_families import Family, Problem, draw

Float64Array = NDArray[np.float64]
LN2, LOG2E = math.log(2), math.log2(math.e)
LAMBDA = 6.0


def ragged(rng: np.random.Generator) -> Sequences:
    """Two sequences of 2 heads, of 3 queries on 9 keys and 2 on 7."""
    query, key, value = (rng.standard_normal((2, length, 3)) for length in (5, 16, 16))
    masks = [visible_keys(3, 9, True), visible_keys(2, 7, False)]
    return Sequences(query, key, value, [slice(0, 3), slice(3, 5)], [slice(0, 9), slice(9, 16)], masks)


@pytest.mark.parametrize("p_error", [None, 2.0**-3], ids=["scores", "P"])
@pytest.mark.parametrize("chunk", [1, alarm.CHUNK])
def test_groups_of_keys_are_added_before_they_are_squared(
    p_error: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarm, "CHUNK", chunk)
    rng = np.random.default_rng(1)
    sequences = ragged(rng)
    exact = softmax_of(sequences, rng.integers(-3, 1, (2, 5, 9)) + rng.integers(0, 2, (2, 5, 9)) * 0.02)
    share, centre = rng.random((2, 5, 9)), rng.standard_normal((2, 5, 3))
    wanted = rng.random((2, 5)) < 0.7

    excess = Alike(sequences, exact, np.zeros((2, 5))).excess(share, wanted, p_error, centre)

    for h, row in np.ndindex(2, 5):
        which = int(row >= 3)
        sees = sequences.visible[which][row - sequences.rows[which].start]
        groups: dict[float, Float64Array] = defaultdict(lambda: np.zeros(3))
        singles = np.zeros(3)
        for j in np.flatnonzero(sees):
            gap = -exact.gap[h, row, j]
            label = gap if p_error is None else math.floor(gap * 4 * LN2 / p_error)
            mine = share[h, row, j] * np.abs(sequences.value[h, sequences.keys[which].start + j] - centre[h, row])
            groups[label] += mine
            singles += mine**2
        expected = sum(group**2 for group in groups.values()) - singles
        assert excess[h, row] == pytest.approx(expected if wanted[h, row] else np.zeros(3), rel=1e-12, abs=1e-13)
    none_has = Alike(sequences, exact, np.zeros((2, 5))).excess(share, wanted, p_error, centre, more_than=9)
    assert np.all(np.isinf(none_has[wanted]))


@pytest.mark.parametrize("p_error", [None, 2.0**-3], ids=["scores", "P"])
def test_equal_keys_are_alike_whatever_last_bits_their_scores_have(p_error: float | None) -> None:
    """float64 products of equal keys with a query differ in last bits where BLAS adds them up in another order."""
    rng = np.random.default_rng(2)
    query, value = rng.standard_normal((2, 2, 64)), rng.standard_normal((2, 9, 64))
    key = rng.standard_normal((2, 3, 64)).repeat(3, axis=1)
    sequences = Sequences(query, key, value, [slice(0, 2)], [slice(0, 9)], [np.ones((2, 9), np.bool_)])
    scores = query @ key.swapaxes(-1, -2)
    scores[..., 0::3], scores[..., 1::3], share = scores[..., 2::3], scores[..., 2::3], rng.random((2, 2, 9))
    spoilt = np.nextafter(
        scores, np.where(np.arange(9) % 3 == 0, np.inf, np.where(np.arange(9) % 3 == 1, -np.inf, scores))
    )
    of_products = np.abs(query) @ np.abs(key).swapaxes(-1, -2)
    assert not np.array_equal(spoilt, scores)

    def excess(scores: Float64Array) -> Float64Array:
        exact = softmax_of(sequences, scores.copy())
        alike = Alike(sequences, exact, slack_of(exact, of_products, 1.0, 64))
        assert alike.tied.all()
        return alike.excess(share, np.ones((2, 2), np.bool_), p_error)

    assert excess(spoilt) == pytest.approx(excess(scores), rel=1e-12)


def expected_terms(p: Problem, fmt: Format) -> tuple[Float64Array, Float64Array]:
    """The terms of logits and of P of the alarm for one query and one tile."""
    u, (n, d) = 2.0**-24, p.key.shape
    theta, each = INTERPRETER.scale_error, -math.log1p(-INTERPRETER.exp2_error)
    g = (d - 1) * u / (1 - (d - 1) * u)  # no more roundings than gamma counts
    g = (1 + g) * (1 + u) - 1 if fmt is FLOAT32 else g
    t = [float(key @ p.query) * p.scale * LOG2E for key in p.key]
    sizes = [float(np.abs(key) @ np.abs(p.query)) * p.scale * LOG2E for key in p.key]
    gap = [max(t) - x for x in t]
    tau = [g * a + u * abs(x) + theta * y for a, x, y in zip(sizes, t, gap, strict=True)]
    weight = [2.0**-x for x in gap]
    weight = [x / sum(weight) for x in weight]
    phi = [math.expm1(LN2 * (x + u * (y + x + max(tau))) + each) for x, y in zip(tau, gap, strict=True)]
    common = [math.expm1(LN2 * theta * y + each) for y in gap]
    out = np.array(weight) @ p.value
    own: dict[float, Float64Array] = defaultdict(lambda: np.zeros(d))
    rounded: dict[float, Float64Array] = defaultdict(lambda: np.zeros(d))
    for j in range(n):
        own[gap[j]] += weight[j] * (phi[j] - common[j]) * np.abs(p.value[j] - out)
        if fmt is not FLOAT32:
            u_p = fmt.unit_roundoff()
            pi = min(1.0, max(u_p, fmt.underflow_error() * 2.0 ** gap[j]))
            rounded[math.floor(gap[j] * 4 * LN2 / u_p)] += weight[j] * pi * np.abs(p.value[j])

    def mean(of_keys: list[float]) -> Float64Array:
        share = np.multiply(weight, of_keys)
        found: Float64Array = np.sqrt(share.sum() * (share @ (p.value - out) ** 2))
        return found

    def norm(groups: dict[float, Float64Array]) -> Float64Array:
        return LAMBDA * np.sqrt(sum((group**2 for group in groups.values()), np.zeros(d)))

    logit = np.minimum(mean(phi), mean(common) + norm(own))
    rounding = np.minimum(sum(rounded.values(), np.zeros(d)), norm(rounded))
    quotient = 1 - float(np.dot(weight, phi))
    return logit / quotient, rounding * (1 + max(phi)) / quotient


@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16, FLOAT32], ids=lambda f: f.name)
@pytest.mark.parametrize("family", ["normal", "near ties", "equal keys", "integers", "zero query", "positive values"])
def test_terms_of_the_alarm_equal_the_scalar_derivation(family: Family, fmt: Format) -> None:
    problem = draw(family, 150, 8, fmt, 1)
    logit, p = expected_terms(problem, fmt)

    visible = np.ones((1, 150), dtype=np.bool_)
    inputs = problem.query[None, None], problem.key[None], problem.value[None], visible
    ours = budget(
        *inputs, scale=problem.scale, fmt=fmt, model=INTERPRETER, tiles=tiling(150, 0, 256), alarm_lambda=LAMBDA
    ).terms

    assert ours["logit"][0, 0] == pytest.approx(logit, rel=1e-3)
    assert ours["P"][0, 0] == pytest.approx(p, rel=1e-3)
