"""The short cut of the alarm: its verdicts are those of the alarm, and what it compares with first is never above."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from properties.numerics.families import make
from properties.numerics.validate import MODELS, plan
from references import alarm_use, least_alarm
from references.alarm_use import Errors, largest_over_alarm
from references.arithmetic_model import HOPPER, INTERPRETER, PERMISSIVE, ArithmeticModel
from references.attention import attention, visible_keys
from references.error_bounds import Budget, Sequence, budgets, gate_of
from references.rounding import as_format
from references.rounding_errors import arithmetic_of
from references.simulator import FAULTS, simulate
from references.tiling import tiling
from tests.value_families import FAMILIES, draw

Float64Array = NDArray[np.float64]
LAMBDA = 6.0
FORMATS = ("float16", "bfloat16", "float32")


def sequence(family: Any, fmt: str, q_len: int, kv_len: int, seed: int = 0, head_dim: int = 16) -> Sequence:
    """Two heads of queries that are all different, on keys of one kv head."""
    problems = [draw(family, kv_len, head_dim, as_format(fmt), seed=seed + i) for i in range(2 * q_len)]
    return Sequence(
        np.array([problem.query for problem in problems]).reshape(2, q_len, head_dim),
        problems[0].key[None],
        problems[0].value[None],
        visible_keys(q_len, kv_len, True),
        tiling(max(kv_len - q_len, 0), min(q_len, kv_len), 16, 32),
    )


def least_and_alarm(
    several: list[Sequence], fmt: str, model: ArithmeticModel, scale: float
) -> Iterator[tuple[Float64Array, Float64Array]]:
    """The bounds of outputs, those that are nearer, and those of log-sum-exps, beside the alarm."""
    head_dim = several[0].query.shape[-1]
    of_gate, of_alarm = (arithmetic_of(model, as_format(fmt), head_dim, confidence) for confidence in (None, LAMBDA))
    gate = gate_of(several, scale, of_gate)
    assert gate is not None
    least = least_alarm.LeastAlarm(gate, of_gate, of_alarm)
    with np.errstate(over="ignore", invalid="ignore"):
        out, nearer, lse = least.out(), least.nearer_out(), least.lse()
    alarm = budgets(several, scale=scale, fmt=fmt, model=model, alarm_lambda=LAMBDA)
    for one, rows, full in zip(several, gate.problem.sequences.rows, alarm, strict=True):
        shape = one.query.shape
        yield out[:, rows].reshape(shape), full.out
        yield nearer[:, rows].reshape(shape), full.out
        yield lse[:, rows].reshape(shape[:2]), full.lse


SUM_FROM_P = dataclasses.replace(
    HOPPER, name="row sum from P", accumulator="ieee", row_sum_from_p=True, p_format="bfloat16", merge="max"
)


@pytest.mark.parametrize("model", [INTERPRETER, HOPPER, PERMISSIVE, SUM_FROM_P], ids=lambda m: m.name)
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_bound_is_never_above_the_alarm(fmt: str, model: ArithmeticModel) -> None:
    shapes = {16: ((4, 70), (5, 2)), 128: ((3, 5), (1, 1))}
    for (seed, family), head_dim in itertools.product(enumerate(FAMILIES), shapes):
        several = [sequence(family, fmt, *shape, seed, head_dim) for shape in shapes[head_dim]]
        for scale in (0.1, 40.0):
            for least, alarm in least_and_alarm(several, fmt, model, scale):
                assert not np.any(least > alarm), family  # NaN says nothing


@pytest.mark.parametrize("model", [INTERPRETER, SUM_FROM_P], ids=lambda m: m.name)
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_bound_is_never_above_the_alarm_of_weights_that_may_be_far_off(fmt: str, model: ArithmeticModel) -> None:
    several = [sequence("constant values", fmt, 3, 20, seed, 512) for seed in range(3)]
    for scale in (3.0, 30.0, 300.0, 3000.0):
        for least, alarm in least_and_alarm(several, fmt, model, scale):
            assert not np.any(least > alarm), scale


def test_the_bound_is_most_of_the_alarm_where_the_law_looks_at_it() -> None:
    """Else every query would need the alarm itself."""
    for fmt, enough, near in (("float16", 0.6, 0.9), ("bfloat16", 0.6, 0.9), ("float32", 0.05, 0.15)):
        several = [sequence("normal", fmt, 32, 96)]
        (out, alarm), (nearer, _), (lse, lse_alarm) = least_and_alarm(several, fmt, INTERPRETER, 0.25)
        assert np.median(out / alarm) > enough
        assert np.median(nearer / alarm) > near
        assert np.median(lse / lse_alarm) > 0.5


def test_a_bound_above_the_alarm_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_alarm, "LEFT", 2.0)

    for least, alarm in least_and_alarm([sequence("normal", "float16", 8, 20)], "float16", INTERPRETER, 1.0):
        assert np.any(least > alarm)


def use_of(errors: list[Errors], alarm: list[Budget]) -> float:
    """The largest error over the alarm."""
    worst = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for its, of in zip(errors, alarm, strict=True):
            for error, allowed in ((its.out, of.out), (its.lse, of.lse)):
                ratio = np.where(error == 0, 0.0, error / allowed)
                worst = max(worst, float(np.where(np.isnan(ratio), np.inf, ratio).max(initial=0.0)))
    return worst


def assert_same_verdict(errors: list[Errors], several: list[Sequence], options: dict[str, Any]) -> float:
    """That of the alarm, whose use is returned."""
    used = use_of(errors, budgets(several, alarm_lambda=LAMBDA, **options))
    found = largest_over_alarm(several, errors, alarm_lambda=LAMBDA, **options)
    assert (found > 1) == (used > 1), (found, used)
    assert found >= used * (1 - alarm_use.UNDECIDED)
    if used > 1:
        assert found == pytest.approx(used, rel=alarm_use.UNDECIDED)
    return used


def test_verdicts_on_correct_and_faulty_kernels_are_those_of_the_alarm() -> None:
    raised = 0
    for count, e in enumerate(plan(outputs=300_000, seed=1)):
        fmt, model = as_format(e.fmt), MODELS[e.model]
        shape = {"num_kv_heads": 2, "rows": 4, "kv_len": min(e.kv_len, 300), "head_dim": 16, "seed": count}
        problem = make(e.family, fmt=fmt, is_causal=e.is_causal, **shape)
        inputs = problem.query, problem.key, problem.value, problem.visible
        tiles = tiling(problem.key.shape[1], 0, e.block_n, e.kv_split_size)
        options: dict[str, Any] = {"scale": problem.scale, "fmt": fmt, "model": model}
        fault = None if count % 2 else FAULTS[count // 2 % len(FAULTS)]
        out, lse = simulate(*inputs, tiles=tiles, seed=count, fault=fault, errors=e.errors, **options)
        right, right_lse = attention(*inputs[:3], is_causal=e.is_causal, scale=problem.scale)
        with np.errstate(invalid="ignore"):
            pairs = [
                np.where(got == should, 0.0, np.abs(got - should)) for got, should in ((out, right), (lse, right_lse))
            ]
        errors = Errors(*(np.where(np.isnan(error), np.inf, error) for error in pairs))
        raised += assert_same_verdict([errors], [Sequence(*inputs, tiles)], options) > 1
    assert count > 250
    assert 20 < raised < count // 2


@pytest.mark.parametrize("fmt", FORMATS)
def test_verdicts_are_those_of_the_alarm_however_near(fmt: str) -> None:
    several = [sequence("normal", fmt, 3, 40), sequence("large logits", fmt, 2, 90), sequence("normal", fmt, 2, 0)]
    options: dict[str, Any] = {"scale": 0.25, "fmt": fmt, "model": INTERPRETER}
    alarm = budgets(several, alarm_lambda=LAMBDA, **options)
    rng = np.random.default_rng(0)
    for use in (0.9, 1 - 2.0**-18, 1 - 2.0**-40, 1.0, 1 + 2.0**-40, 1 + 2.0**-18, 1.1):
        for tensor in ("out", "lse"):
            errors = [Errors(0.9 * of.out, 0.9 * of.lse) for of in alarm]
            error, allowed = getattr(errors[1], tensor), getattr(alarm[1], tensor)
            place = tuple(int(rng.integers(n)) for n in error.shape)
            error[place] = allowed[place] * use

            assert assert_same_verdict(errors, several, options) == pytest.approx(max(use, 0.9), rel=2.0**-50)


def test_what_is_no_number_or_must_be_exact_raises_it() -> None:
    several = [sequence("normal", "float16", 3, 5), sequence("normal", "float16", 2, 0)]
    options: dict[str, Any] = {"scale": 0.25, "fmt": "float16", "model": INTERPRETER, "alarm_lambda": LAMBDA}
    errors = [Errors(np.zeros(one.query.shape), np.zeros(one.query.shape[:2])) for one in several]
    assert largest_over_alarm(several, errors, **options) == 0
    for array in (errors[0].out, errors[0].lse, errors[1].out, errors[1].lse):
        array.flat[0] = np.inf
        assert largest_over_alarm(several, errors, **options) == np.inf
        array.flat[0] = 0.0
    errors[1].out[0, 1, 3] = 1e-30
    assert largest_over_alarm(several, errors, **options) == np.inf
    several[0].value[0, 0, 2] = np.nan  # no bound: only the same result will do
    errors[1].out[0, 1, 3], errors[0].out[0, 1, 2] = 0.0, 1e-30
    assert largest_over_alarm(several, errors, **options) == np.inf


def test_the_alarm_itself_is_computed_for_queries_that_need_it_only(monkeypatch: pytest.MonkeyPatch) -> None:
    several = [sequence("normal", "bfloat16", 6, 60), sequence("normal", "bfloat16", 5, 80)]
    options: dict[str, Any] = {"scale": 0.25, "fmt": "bfloat16", "model": INTERPRETER}
    alarm = budgets(several, alarm_lambda=LAMBDA, **options)
    asked: list[tuple[int, ...]] = []

    def watched(some: list[Sequence], **options: Any) -> list[Budget]:
        asked.extend(one.query.shape for one in some)
        return budgets(some, **options)

    monkeypatch.setattr(alarm_use, "budgets", watched)
    errors = [Errors(0.4 * of.out, 0.4 * of.lse) for of in alarm]

    assert 0.4 <= largest_over_alarm(several, errors, alarm_lambda=LAMBDA, **options) < 1
    assert asked == []

    errors[1].out[1, 2, 4] *= 3
    errors[1].lse[0, 3] *= 3
    assert largest_over_alarm(several, errors, alarm_lambda=LAMBDA, **options) == pytest.approx(
        1.2, rel=alarm_use.UNDECIDED
    )
    assert asked == [(1, 2, 16)]


@pytest.mark.parametrize("tensor", ["out", "lse"])
def test_where_nothing_is_known_the_alarm_itself_decides(tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    several = [sequence("normal", "float16", 2, 10)]
    options: dict[str, Any] = {"scale": 0.25, "fmt": "float16", "model": INTERPRETER, "alarm_lambda": LAMBDA}
    alarm = budgets(several, **options)[0]
    for name in ("out", "nearer_out") if tensor == "out" else ("lse",):
        unknown = np.full((1, 4, 16) if tensor == "out" else (1, 4), np.nan)
        monkeypatch.setattr(least_alarm.LeastAlarm, name, lambda _, unknown=unknown: unknown)
    for use in (0.5, 1.5):
        errors = Errors(np.zeros(alarm.out.shape), np.zeros(alarm.lse.shape))
        getattr(errors, tensor).flat[3] = use * getattr(alarm, tensor).flat[3]
        assert largest_over_alarm(several, [errors], **options) == pytest.approx(use, rel=alarm_use.UNDECIDED)
