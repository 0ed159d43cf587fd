"""The runner sees every byte: each subject here does one thing wrong, and is caught by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from properties import subjects
from properties.assertions import LawViolation
from properties.capabilities import Capabilities, NotOffered
from properties.case import Case, Row, Step
from properties.checking import check
from properties.guards import GUARD_ELEMENTS, Guarded, bits_of, poison, tensor_of, torch_dtype
from properties.runner import run
from properties.subjects import Subject, naive

NAIVE = subjects.load("properties.subjects.naive:attention_with_kv_cache")
GIVEN = Case(
    rows=(Row(3, (2, 1)), Row(0, (1, 1))),
    steps=(Step(padding=1), Step()),
    num_kv_heads=2,
    group_size=2,
    start="tuple",
    capacity=8,
    cache_max_len=8,
    values="normal",
    cache_layout="gapped",
    key_layout="transposed",
)
GROWING = replace(GIVEN, capacity=4, start="kv_cache", cache_layout="contiguous")
FULL = replace(GIVEN, cache_max_len=5)
FORKING = replace(
    GIVEN,
    rows=(Row(3, (2, 1, 2)),),
    steps=(Step(), Step(update_cache=False), Step(parent=0, rollback=1)),
    start="kv_cache",
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "case",
    [Case(), GIVEN, GROWING, FULL, FORKING, Case(rows=()), Case(rows=(Row(0, (0,)),))],
    ids=["first call", "given", "growing", "full", "forking", "batch 0", "no query"],
)
def test_a_correct_kernel_passes(case: Case, dtype: Any) -> None:
    used = check(replace(case, dtype=dtype), NAIVE)

    assert 0 <= used.out <= 1
    assert 0 <= used.lse <= 1


def test_the_plain_function_is_checked_too() -> None:
    case = Case(rows=(Row(5, (3,)), Row(5, (3,), 1)), op="attention", values="normal", is_causal=True)

    assert check(case, NAIVE).out > 0


def test_a_subject_is_not_run_on_what_it_does_not_offer() -> None:
    only_cached = replace(NAIVE, attention=None, capabilities=Capabilities(ops=("attention_with_kv_cache",)))

    with pytest.raises(NotOffered, match="op attention"):
        run(Case(rows=(Row(5, (3,)),), op="attention"), only_cached)


def wrong(change: Callable[..., Any]) -> Subject:
    """The naive subject with something done before it returns."""

    def attention_with_kv_cache(query: Any, key: Any, value: Any, past_key_value: Any = None, **options: Any) -> Any:
        result = naive.attention_with_kv_cache(query, key, value, past_key_value, **options)
        changed = change(result, query=query, key=key, value=value, past=past_key_value, **options)
        return result if changed is None else changed

    return replace(NAIVE, attention_with_kv_cache=attention_with_kv_cache)


def outside(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """An element ``elements`` after the tensor's first one in memory."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + elements)


def overwrite_next_slot(result: Any, **_: Any) -> None:
    cache = result[1]
    if cache is not None and cache.seq_lens[0] < cache[0].shape[2]:
        cache[0][0, 1, cache.seq_lens[0], 3] = 1.0


def overwrite_old_slot(result: Any, **_: Any) -> None:
    if result[1] is not None:
        result[1][1][0, 0, 0, 0] += 1.0


def lose_a_token(result: Any, **_: Any) -> None:
    if result[1] is not None:
        result[1][0][0, 0, result[1].seq_lens[0] - 1, 5] += 1.0


def write_into_a_gap(_result: Any, past: Any, **_: Any) -> None:
    outside(past[0], past[0].shape[3]).fill_(1.0)


def write_before_the_cache(_result: Any, past: Any, **_: Any) -> None:
    outside(past[0], -3).fill_(1.0)


def write_after_the_output(result: Any, **_: Any) -> None:
    outside(result[0], result[0].numel()).fill_(1.0)


def change_the_query(_result: Any, query: torch.Tensor, **_: Any) -> None:
    query[0, 0, 0, 0] = 7.0


def change_seq_lens(_result: Any, seq_lens: torch.Tensor | None = None, **_: Any) -> None:
    if seq_lens is not None:
        seq_lens += 1


def freeze_lengths(result: Any, **_: Any) -> None:
    result[1].seq_lens -= 1


def move_the_cache(result: Any, **_: Any) -> Any:
    return result[0], naive.KVCache(result[1][0].clone(), result[1][1].clone(), result[1].seq_lens), result[2]


def return_too_little(result: Any, **_: Any) -> Any:
    return result[:2]


def return_another_dtype(result: Any, **_: Any) -> Any:
    return result[0].double(), result[1], result[2]


def return_a_strided_output(result: Any, **_: Any) -> Any:
    return result[0].transpose(1, 2).contiguous().transpose(1, 2), result[1], result[2]


def return_a_cache_unasked(result: Any, past: Any, update_cache: bool = True, **_: Any) -> Any:
    return (result[0], past, result[2]) if not update_cache else None


@pytest.mark.parametrize(
    ("change", "case", "kind"),
    [
        (overwrite_next_slot, GIVEN, "cache"),
        (overwrite_old_slot, GIVEN, "cache"),
        (lose_a_token, GIVEN, "append"),
        (lose_a_token, GROWING, "append"),
        (write_into_a_gap, GIVEN, "cache"),
        (write_before_the_cache, GIVEN, "cache"),
        (write_after_the_output, Case(), "guard"),
        (change_the_query, GIVEN, "inputs"),
        (change_seq_lens, GIVEN, "inputs"),
        (freeze_lengths, GIVEN, "lengths"),
        (move_the_cache, GIVEN, "cache"),
        (return_too_little, GIVEN, "result"),
        (return_another_dtype, GIVEN, "result"),
        (return_a_strided_output, GIVEN, "result"),
        (return_a_cache_unasked, FORKING, "result"),
    ],
)
def test_what_a_kernel_does_wrong_is_found_and_named(change: Callable[..., Any], case: Case, kind: str) -> None:
    with pytest.raises(LawViolation) as failure:
        check(case, wrong(change))

    assert failure.value.kind == kind
    assert "\n  case: batch=" in failure.value.report


def never_overflow(query: Any, key: Any, value: Any, past_key_value: Any = None, **options: Any) -> Any:
    options["cache_max_len"] = 4096
    return naive.attention_with_kv_cache(query, key, value, past_key_value, **options)


def raise_something_else(query: Any, key: Any, value: Any, past_key_value: Any = None, **options: Any) -> Any:
    try:
        return naive.attention_with_kv_cache(query, key, value, past_key_value, **options)
    except naive.CacheOverflowError as error:
        raise KeyError(str(error)) from None


@pytest.mark.parametrize("function", [never_overflow, raise_something_else])
def test_an_overflow_must_raise_the_promised_error(function: Callable[..., Any]) -> None:
    with pytest.raises(LawViolation) as failure:
        check(FULL, replace(NAIVE, attention_with_kv_cache=function))

    assert failure.value.kind == "overflow"


def test_an_overflow_must_leave_every_byte() -> None:
    def overflow_after_writing(query: Any, key: Any, value: Any, past_key_value: Any = None, **options: Any) -> Any:
        try:
            return naive.attention_with_kv_cache(query, key, value, past_key_value, **options)
        except naive.CacheOverflowError:
            past_key_value[0][1, 0, 5] = 1.0
            raise

    with pytest.raises(LawViolation, match="written by a call that must not write it") as failure:
        check(FULL, replace(NAIVE, attention_with_kv_cache=overflow_after_writing))

    assert failure.value.kind == "cache"


def test_an_exception_is_a_verdict() -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("no reason")

    with pytest.raises(LawViolation, match="a valid call raised\n  ZeroDivisionError: no reason"):
        check(Case(), replace(NAIVE, attention_with_kv_cache=raises))


def test_an_overflow_inside_the_interpreter_is_judged_by_its_result_not_raised_as_a_warning() -> None:
    def overflows(*arguments: Any, **options: Any) -> Any:
        assert np.isinf(np.float32(3e38) * np.ones(1, np.float32) * np.float32(2))
        return naive.attention_with_kv_cache(*arguments, **options)

    assert check(Case(), replace(NAIVE, attention_with_kv_cache=overflows)).out == 0.0


def test_what_is_not_read_is_nan_and_without_poison_is_not() -> None:
    seen: list[torch.Tensor] = []

    def look(_result: Any, key: torch.Tensor, past: Any, **_: Any) -> None:
        seen.extend([key.clone(), past[0].clone()])

    for poisoned in (True, False):
        run(GIVEN, wrong(look), poisoned=poisoned)
    key, cache, _, _, clean_key, clean_cache, _, _ = seen

    assert key[1, :, 1:].isnan().all()
    assert not key[0, :, :2].isnan().any()
    assert not clean_key.isnan().any()
    assert cache[1, :, 1:].isnan().all()
    assert not clean_cache.isnan().any()


def test_a_kernel_that_reads_a_hidden_slot_is_caught() -> None:
    def reads_one_slot_more(query: Any, key: Any, value: Any, past_key_value: Any = None, **options: Any) -> Any:
        out, cache, lse = naive.attention_with_kv_cache(query, key, value, past_key_value, **options)
        if cache is not None:
            out[0, 0, 0] += 0 * cache[1][0, 0, cache.seq_lens[0]]
        return out, cache, lse

    with pytest.raises(LawViolation, match="not a finite number"):
        check(GIVEN, replace(NAIVE, attention_with_kv_cache=reads_one_slot_more))


def test_allocations_of_the_subject_are_nan_before_it_writes() -> None:
    original = naive.empty

    def leaves_an_element(result: Any, **_: Any) -> None:
        fresh = naive.empty(tuple(result[0].shape), result[0].dtype, result[0].device)
        assert fresh.isnan().all()
        result[0][0, 0, 0, 0] = fresh[0, 0, 0, 0]

    with pytest.raises(LawViolation, match="not a finite number"):
        check(GIVEN, wrong(leaves_an_element))
    assert naive.empty is original


def test_outputs_of_a_run_that_raised_are_a_violation() -> None:
    made = run(FULL, replace(NAIVE, attention_with_kv_cache=never_overflow))

    with pytest.raises(LawViolation, match="a call that must overflow returned"):
        _ = made.outputs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bits_reach_torch_and_come_back_without_a_copy(dtype: str) -> None:
    bits = np.arange(256, dtype=np.uint32 if dtype == "float32" else np.uint16)
    tensor = tensor_of(bits, torch_dtype(dtype), "cpu")
    bits[0] = poison(dtype, "unused")

    assert tensor.dtype == torch_dtype(dtype)
    assert tensor[0].isnan()
    assert np.shares_memory(bits_of(tensor), bits)
    assert all(
        tensor_of(np.array([poison(dtype, role)], bits.dtype), torch_dtype(dtype), "cpu").isnan()
        for role in ("guard", "unused", "fresh")
    )


def test_a_guarded_tensor_names_the_place_of_a_change() -> None:
    bits = np.zeros((2, 3), np.uint16)
    guarded = Guarded.holding("x", bits, torch.float16, "cpu", (8, 2))
    before = guarded.snapshot()
    assert guarded.difference(before) is None
    assert guarded.broken_guard() is None

    flat = guarded.storage.numpy()
    for index, words in (
        (GUARD_ELEMENTS + 1, "in a gap of it"),
        (GUARD_ELEMENTS - 1, "before it"),
        (flat.size - 1, "after it"),
        (GUARD_ELEMENTS + 10, r"x\[1, 1\] was 0x0000, is 0x0005 \(1 elements differ\)"),
    ):
        flat[index], old = 5, flat[index]
        found = guarded.difference(before)
        assert found is not None
        assert re.search(words, found)
        assert (guarded.broken_guard() is not None) == ("before" in words or "after" in words)
        flat[index] = old
