"""Why the oracle may be believed: exact arithmetic, a longer format, and a second way to compute the same."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import mpmath  # type: ignore[import-untyped]  # it ships no type information
import numpy as np
import pytest
from numpy.typing import NDArray

from properties.numerics.cost import drawn, work_of
from properties.subjects import activate
from references.arithmetic_model import AMPERE, HOPPER, INTERPRETER, REFERENCE, ArithmeticModel
from references.attention import attention
from references.error_bounds import ORACLE_SHARE, Budget, budget, budgets
from references.rounding import BFLOAT16, FLOAT16, FLOAT32, Format
from references.tiling import tiling
from tests.value_families import FAMILIES, Family, Problem, draw

Float64Array = NDArray[np.float64]
FORMATS = (FLOAT16, BFLOAT16, FLOAT32)
# kv_len, head_dim, seeds: with 17 families and 3 formats, 1,836 problems.
SIZES = ((1, 2, 6), (2, 3, 10), (7, 8, 10), (19, 4, 8), (40, 16, 2))
DIGITS = 60


def oracle(problem: Problem) -> tuple[Float64Array, float]:
    out, lse = attention(
        problem.query[None, None],
        problem.key[None],
        problem.value[None],
        is_causal=False,
        scale=problem.scale,
    )
    return out[0, 0], float(lse[0, 0])


def budget_of(problem: Problem, fmt: Format | str, model: ArithmeticModel, block_n: int = 16) -> Budget:
    kv_len = len(problem.key)
    return budget(
        problem.query[None, None],
        problem.key[None],
        problem.value[None],
        np.ones((1, kv_len), dtype=np.bool_),
        scale=problem.scale,
        fmt=fmt,
        model=model,
        tiles=tiling(kv_len, 0, block_n),
    )


def exact(problem: Problem) -> tuple[list[mpmath.mpf], mpmath.mpf]:
    """Scores in rational arithmetic, the exponentials with 60 digits."""
    query = [Fraction(x) for x in problem.query.tolist()]
    logits = []
    for row in problem.key.tolist():
        score = sum((a * Fraction(b) for a, b in zip(query, row, strict=True)), Fraction(0))
        logit = score * Fraction(problem.scale)
        logits.append(mpmath.mpf(logit.numerator) / logit.denominator)
    peak = max(logits)
    weights = [mpmath.exp(x - peak) for x in logits]
    total = mpmath.fsum(weights)
    out = [
        mpmath.fsum(w * mpmath.mpf(x) for w, x in zip(weights, column, strict=True)) / total
        for column in problem.value.T.tolist()
    ]
    return out, peak + mpmath.log(total)


def share_used(error: mpmath.mpf, allowed: float) -> float:
    return 0.0 if error == 0 else float(error / mpmath.mpf(allowed))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_within_its_own_budget_of_exact_arithmetic(family: Family) -> None:
    worst, worst_lse = 0.0, 0.0
    with mpmath.workdps(DIGITS):
        for fmt in FORMATS:
            for kv_len, head_dim, seeds in SIZES:
                for seed in range(seeds):
                    problem = draw(family, kv_len, head_dim, fmt, seed)
                    out, lse = oracle(problem)
                    allowed = budget_of(problem, "float64", REFERENCE)
                    exact_out, exact_lse = exact(problem)
                    for i, value in enumerate(exact_out):
                        error = abs(mpmath.mpf(float(out[i])) - value)
                        worst = max(worst, share_used(error, allowed.out[0, 0, i]))
                    error = abs(mpmath.mpf(lse) - exact_lse)
                    worst_lse = max(worst_lse, share_used(error, allowed.lse[0, 0]))

    assert worst <= 1
    assert worst_lse <= 1
    assert worst > 0 or family == "zero query"  # the comparison saw rounding errors


@pytest.mark.parametrize("model", [INTERPRETER, HOPPER, AMPERE], ids=lambda m: m.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_s_own_error_is_the_share_that_budgets_reserve_for_it(
    family: Family, model: ArithmeticModel
) -> None:
    for fmt in FORMATS:
        for kv_len, head_dim in ((1, 2), (7, 8), (40, 16), (700, 128)):
            problem = draw(family, kv_len, head_dim, fmt, 0)

            own = budget_of(problem, "float64", REFERENCE, block_n=1024)
            kernel = budget_of(problem, fmt, model)

            assert np.all(own.out <= ORACLE_SHARE * (kernel.out - kernel.terms["oracle"]))
            assert np.all(own.lse <= ORACLE_SHARE * (kernel.lse - kernel.lse_terms["oracle"]))
            assert np.all(own.out > 0)
    assert ORACLE_SHARE < 1e-6


def test_the_oracle_s_own_error_is_within_that_share_in_drawn_cases() -> None:
    subject = activate("flashcore")
    compared = 0
    for case in drawn(60, seed_of_run=3):
        work = work_of(case, subject)
        at_once = [dataclasses.replace(one, tiles=tiling(one.key.shape[1], 0, 1 << 20)) for one in work.sequences]
        own = budgets(at_once, scale=work.scale, fmt="float64", model=REFERENCE)
        kernel = budgets(work.sequences, scale=work.scale, fmt=work.fmt, model=INTERPRETER)
        for mine, its in zip(own, kernel, strict=True):
            bounded = ~np.isnan(its.out)
            assert np.all((mine.out <= ORACLE_SHARE * (its.out - its.terms["oracle"]))[bounded])
            bounded = ~np.isnan(its.lse)
            assert np.all((mine.lse <= ORACLE_SHARE * (its.lse - its.lse_terms["oracle"]))[bounded])
            compared += int(bounded.sum())
    assert compared > 1000


@pytest.mark.parametrize("family", ["normal", "huge logits", "rising", "positive values"])
def test_the_oracle_agrees_with_long_double_at_length(family: Family) -> None:
    problem = draw(family, 20_000, 64, FLOAT16, 5)
    out, lse = oracle(problem)
    query, key, value = (x.astype(np.longdouble) for x in (problem.query, problem.key, problem.value))
    logits = (key * query).sum(axis=1) * np.longdouble(problem.scale)
    weights = np.exp(logits - logits.max())
    longer = (weights[:, None] * value).sum(axis=0) / weights.sum()
    longer_lse = logits.max() + np.log(weights.sum())

    allowed = budget_of(problem, "float64", REFERENCE, block_n=1 << 20)

    assert np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant
    assert np.all(np.abs(longer - out) <= allowed.out[0, 0])
    assert abs(longer_lse - lse) <= allowed.lse[0, 0]


def backwards(problem: Problem) -> tuple[list[float], float]:
    """Attention from the last key to the first, in base 2, one running maximum, plain Python floats."""
    peak, total, sums = -math.inf, 0.0, [0.0] * problem.value.shape[1]
    factor = problem.scale / math.log(2)
    query = problem.query.tolist()
    for key, value in zip(problem.key[::-1].tolist(), problem.value[::-1].tolist(), strict=True):
        logit = math.fsum(a * b for a, b in zip(query, key, strict=True)) * factor
        higher = max(peak, logit)
        shrink, weight = math.exp2(peak - higher), math.exp2(logit - higher)
        total = total * shrink + weight
        sums = [s * shrink + weight * x for s, x in zip(sums, value, strict=True)]
        peak = higher
    return [s / total for s in sums], (peak + math.log2(total)) * math.log(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_implementation_in_another_order_agrees_within_both_budgets(family: Family) -> None:
    second = dataclasses.replace(REFERENCE, name="backwards", scale_error=2.0**-52)
    for fmt in FORMATS:
        for kv_len, head_dim in ((1, 2), (7, 8), (300, 32)):
            problem = draw(family, kv_len, head_dim, fmt, 3)
            out, lse = oracle(problem)
            other_out, other_lse = backwards(problem)
            mine = budget_of(problem, "float64", REFERENCE, block_n=1 << 20)
            reversed_problem = Problem(problem.query, problem.key[::-1], problem.value[::-1], problem.scale)
            theirs = budget_of(reversed_problem, "float64", second, block_n=1)

            assert np.all(np.abs(out - other_out) <= (mine.out + theirs.out)[0, 0])
            assert abs(lse - other_lse) <= (mine.lse + theirs.lse)[0, 0]
