"""The alarm that verify runs: what only it sees, what it leaves alone, and what it cannot be talked into."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from properties import subjects
from properties.alarming import alarm_used, assert_no_alarm_comes_back
from properties.assertions import LawViolation
from properties.case import Case, Row
from properties.checking import check_values
from properties.recorder import recorder
from properties.runner import run
from properties.subjects import Subject, naive
from references.arithmetic_model import INTERPRETER
from references.rounding import Format, round_to

LONG = Case(
    rows=(Row(cached=480, new=(32,)),),
    head_dim=64,
    dtype="float16",
    is_causal=True,
    start="tuple",
    capacity=512,
    cache_max_len=512,
    values="normal",
)


def with_weights_of(bits: int) -> Subject:
    """Plain PyTorch whose P has so many significand bits; float16 has 11."""
    narrow = Format("narrow", bits, -14, 65504.0, 16)

    def attend(query: Any, key: Any, value: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (key.float() @ query.float()) * scale
        weights = torch.exp(logits - logits.max())
        rounded = torch.from_numpy(round_to(weights.double().numpy(), narrow)).float()
        return rounded @ value.float() / weights.sum(), torch.logsumexp(logits, dim=0)

    def attention_with_kv_cache(*arguments: Any, **options: Any) -> Any:
        return naive.attention_with_kv_cache(*arguments, attend=attend, **options)

    return dataclasses.replace(
        subjects.load("properties.subjects.naive:attention_with_kv_cache"),
        attention_with_kv_cache=attention_with_kv_cache,
        model=lambda _: INTERPRETER,
    )


def test_weights_three_bits_too_narrow_raise_the_alarm_and_nothing_else() -> None:
    subject = with_weights_of(8)
    tally = recorder.start()

    assert check_values(run(LONG, subject)).out < 1
    with pytest.raises(LawViolation) as violation:
        assert_no_alarm_comes_back(LONG, subject)

    assert violation.value.kind == "alarm"
    assert "came back on 5 of 5 fresh draws" in violation.value.report
    assert (tally.alarm.judged, tally.alarm.raised, tally.alarm.came_back) == (1, 1, 1)


def test_weights_in_the_declared_format_raise_none() -> None:
    tally = recorder.start()

    assert_no_alarm_comes_back(LONG, with_weights_of(11))

    assert (tally.alarm.judged, tally.alarm.raised, tally.alarm.came_back) == (1, 0, 0)
    assert 0 < tally.alarm.worst < 1


def test_the_shipped_kernels_raise_none_in_any_format() -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        recorder.start()
        assert_no_alarm_comes_back(dataclasses.replace(LONG, dtype=dtype))
        assert recorder.tally.alarm.raised == 0


def test_an_alarm_that_does_not_come_back_fails_nothing() -> None:
    calls = 0
    good, bad = with_weights_of(11), with_weights_of(8)

    def once(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return (bad if calls <= 1 else good).attention_with_kv_cache(*arguments, **options)

    tally = recorder.start()

    assert_no_alarm_comes_back(LONG, dataclasses.replace(good, attention_with_kv_cache=once))

    assert (tally.alarm.raised, tally.alarm.came_back) == (1, 0)
    assert tally.alarm.worst > 1


def test_an_output_that_is_not_a_number_is_an_alarm() -> None:
    def poisoned(*arguments: Any, **options: Any) -> Any:
        out, *rest = naive.attention_with_kv_cache(*arguments, **options)
        return (torch.full_like(out, torch.nan), *rest)

    subject = dataclasses.replace(with_weights_of(11), attention_with_kv_cache=poisoned)

    assert alarm_used(run(LONG, subject)) == float("inf")
