"""Budgets of several sequences at once against those of every query alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from references import shares, softmax
from references.arithmetic_model import HOPPER, INTERPRETER, PERMISSIVE, ArithmeticModel
from references.attention import visible_keys
from references.error_bounds import ORACLE_SHARE, Sequence, budgets
from references.rounding import FLOAT16
from references.tiling import tiling
from tests.value_families import Family, draw

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8


def drawn(
    family: Family, q_len: int, kv_len: int, *, is_causal: bool = True, kv_split_size: int | None = None
) -> Sequence:
    """A sequence whose queries are all different; those of a kv head share its keys and values."""
    problems = [
        [draw(family, max(kv_len, 1), HEAD_DIM, FLOAT16, seed=head * q_len + i) for i in range(q_len)]
        for head in range(NUM_Q_HEADS)
    ]
    kv_heads = [problems[head][0] for head in range(0, NUM_Q_HEADS, NUM_Q_HEADS // NUM_KV_HEADS)]
    return Sequence(
        query=np.array([[problem.query for problem in head] for head in problems]),
        key=np.array([problem.key[:kv_len] for problem in kv_heads]),
        value=np.array([problem.value[:kv_len] for problem in kv_heads]),
        visible=visible_keys(q_len, kv_len, is_causal),
        tiles=tiling(max(kv_len - q_len, 0), min(q_len, kv_len), 4, kv_split_size),
    )


def alone(sequence: Sequence, head: int, i: int) -> Sequence:
    """One query of one head, with the keys of its kv head."""
    kv_head = head // (NUM_Q_HEADS // NUM_KV_HEADS)
    return Sequence(
        sequence.query[head : head + 1, i : i + 1],
        sequence.key[kv_head : kv_head + 1],
        sequence.value[kv_head : kv_head + 1],
        sequence.visible[i : i + 1],
        sequence.tiles,
    )


def ragged() -> list[Sequence]:
    """Sequences of which nothing is alike."""
    together = [
        drawn("normal", 3, 11, kv_split_size=4),
        drawn("wide range", 1, 40, is_causal=False),
        drawn("rising", 2, 1),
        drawn("positive values", 5, 3),
        drawn("subnormal", 1, 23, kv_split_size=8),
        drawn("normal", 2, 0),
    ]
    together[3].value[1, 2, 5] = np.inf
    return together


# What float64 may lose to cancellation in the centred term.
NEAR: dict[str, Any] = {"rel": ORACLE_SHARE, "abs": 0.0, "nan_ok": True}


@pytest.mark.parametrize("alarm_lambda", [None, 6.0], ids=["gate", "alarm"])
@pytest.mark.parametrize("model", [INTERPRETER, HOPPER, PERMISSIVE], ids=lambda m: m.name)
def test_sequences_together_have_the_budgets_that_each_query_has_alone(
    model: ArithmeticModel, alarm_lambda: float | None
) -> None:
    together = ragged()
    options: dict[str, Any] = {"scale": 0.3, "fmt": "float16", "model": model, "alarm_lambda": alarm_lambda}

    for sequence, found in zip(together, budgets(together, **options), strict=True):
        for head, i in np.ndindex(*sequence.query.shape[:2]):
            single = budgets([alone(sequence, head, i)], **options)[0]
            assert found.out[head, i] == pytest.approx(single.out[0, 0], **NEAR)
            assert found.by_term[1:, head, i] == pytest.approx(single.by_term[1:, 0, 0], **NEAR)
            assert found.lse_by_term[:, head, i] == pytest.approx(single.lse_by_term[:, 0, 0], **NEAR)
            assert found.overflow_free[head, i] == single.overflow_free[0, 0]


def test_heads_together_have_the_budgets_that_each_has_alone_where_one_key_has_nearly_all_of_the_weight() -> None:
    """There the heaviest key of each row is taken apart."""
    together = drawn("normal", 1, 9)
    options: dict[str, Any] = {"scale": 10.0, "fmt": "float32", "model": INTERPRETER}

    found = budgets([together], **options)[0]

    for head in range(NUM_Q_HEADS):
        single = budgets([alone(together, head, 0)], **options)[0]
        assert found.out[head] == pytest.approx(single.out[0], **NEAR)


@pytest.mark.parametrize("model", [INTERPRETER, HOPPER, PERMISSIVE], ids=lambda m: m.name)
def test_of_many_keys_the_underflow_is_overestimated_where_nothing_else_is_changed(
    model: ArithmeticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "MANY_KEYS", 40)
    sequences = [drawn("normal", 2, 50, kv_split_size=8), drawn("normal", 1, 60), drawn("normal", 1, 9)]
    beyond_reach = dataclasses.replace(sequences[1], query=256 * sequences[1].query)
    sequences.append(beyond_reach)
    batches = [*([sequence] for sequence in sequences), sequences]
    options: dict[str, Any] = {"scale": 0.7, "fmt": "float16", "model": model}

    quick = [found for batch in batches for found in budgets(batch, **options)]
    monkeypatch.setattr(shares, "MANY_KEYS", 1000)
    exact = [found for batch in batches for found in budgets(batch, **options)]

    for place, (found, expected) in enumerate(zip(quick, exact, strict=True)):
        assert found.out == pytest.approx(expected.out, rel=2.0**-40, abs=0.0)
        assert np.array_equal(found.overflow_free, expected.overflow_free)
        assert np.array_equal(found.lse, expected.lse)
        more = found.terms["underflow"] > expected.terms["underflow"] * (1 + 2.0**-40)
        sees_many = [[False, True], [True], [False], [False]][place % 4]
        assert np.all(more == np.array(sees_many)[:, None])
        assert np.all(found.terms["underflow"] >= expected.terms["underflow"] * (1 - 2.0**-40))


def test_a_value_that_is_no_number_is_seen_among_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MANY_KEYS", 40)
    sequence = drawn("normal", 1, 50)
    sequence.value[0, 49, 3] = np.nan
    sequence.value[1, 7, 2] = -np.inf

    found = budgets([sequence], scale=0.7, fmt="float16", model=INTERPRETER)[0]

    unbounded = np.zeros(found.out.shape, np.bool_)
    unbounded[:3, 0, 3] = unbounded[3:, 0, 2] = True
    assert np.array_equal(np.isnan(found.out), unbounded)
    assert not found.overflow_free.any()


@pytest.mark.parametrize("model", [INTERPRETER, HOPPER], ids=lambda m: m.name)
def test_budgets_do_not_depend_on_how_many_keys_are_worked_on_at_once(
    model: ArithmeticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = ragged()
    single_rows = [alone(sequence, 0, 0) for sequence in sequences]
    batches = [sequences, single_rows, *([sequence] for sequence in sequences)]
    options: dict[str, Any] = {"scale": 0.3, "fmt": "float16", "model": model}

    whole = [found for batch in batches for found in budgets(batch, **options)]
    monkeypatch.setattr(softmax, "NUMBERS_AT_ONCE", 3 * HEAD_DIM)
    pieces = [found for batch in batches for found in budgets(batch, **options)]

    for found, expected in zip(pieces, whole, strict=True):
        assert found.out == pytest.approx(expected.out, **NEAR)
        assert found.by_term[1:] == pytest.approx(expected.by_term[1:], **NEAR)
        assert found.lse_by_term == pytest.approx(expected.lse_by_term, **NEAR)
        assert np.array_equal(found.overflow_free, expected.overflow_free)
