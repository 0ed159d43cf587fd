"""Calls with one thing wrong, made from one that is right: each must raise before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from properties.assertions import LawViolation, describe
from properties.case import Case
from properties.subjects import Subject

Arguments = tuple[list[torch.Tensor], dict[str, Any]]
_OTHER_DTYPE = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16, torch.float32: torch.float16}
_NAMES = ("query", "key", "value")


def among_malformed(subject: Subject, case: Case) -> Subject:
    """Before every call, and after it, come others with one thing wrong."""
    function = subject.attention_with_kv_cache

    def call(*tensors: Any, **options: Any) -> Any:
        _assert_refused(subject, tensors, options, case)
        result = function(*tensors, **options)
        _assert_refused(subject, tensors, options, case)
        return result

    return replace(subject, attention_with_kv_cache=call, is_disturbed=True)


def _assert_refused(subject: Subject, tensors: tuple[torch.Tensor, ...], options: dict[str, Any], case: Case) -> None:
    for what, (changed, others) in malformed(tensors, options):
        try:
            with torch.enable_grad():
                _, cache, *_ = subject.attention_with_kv_cache(*changed, **others)
            # Lengths that only the device reads are refused when the cache is next looked at.
            for looked_at in (cache, others.get("past_key_value")):
                getattr(looked_at, "check", lambda: None)()
        except (TypeError, ValueError, subject.overflow_error):
            continue
        raise LawViolation("accepted", f"a call with {what} was accepted\n  case: {describe(case)}", case)


def malformed(tensors: tuple[torch.Tensor, ...], options: dict[str, Any]) -> Iterator[tuple[str, Arguments]]:
    """What is wrong, and the call: of every kind that the call has room for."""
    query, key, _ = tensors
    for position, name in enumerate(_NAMES):
        given = tensors[position]
        for what, other in (
            (f"{name} of another dtype", given.to(_OTHER_DTYPE[given.dtype])),
            (f"{name} of another rank", given[0] if given.shape[0] else given[None]),
            (f"{name} of twice the columns", torch.cat([given, given], 3)),
            (f"{name} of other tokens", torch.cat([given, given[:, :, :1]], 2)),
            (f"{name} of another batch", torch.cat([given, given[:1]], 0)),
            (f"{name} that requires grad", given.detach().clone().requires_grad_()),
        ):
            if other.shape != given.shape or other.dtype != given.dtype or other.requires_grad:
                yield what, ([*tensors[:position], other, *tensors[position + 1 :]], options)
    if key.shape[1] > 1:
        yield "an odd number of query heads", ([torch.cat([query, query[:, :1]], 1), *tensors[1:]], options)
    for name, value in _malformed_options(tensors, options):
        yield (
            f"{name}={value!r}" if not hasattr(value, "dtype") else f"{name}={value}",
            (
                list(tensors),
                {**options, name: value},
            ),
        )


def _malformed_options(tensors: tuple[torch.Tensor, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    query, key, _ = tensors
    batch, q_len, device = query.shape[0], query.shape[2], query.device
    yield from (("scale", float("inf")), ("scale", float("nan")), ("scale", True), ("scale", "1"))
    yield from (("block_m", 0), ("block_n", 24), ("is_causal", int(options["is_causal"])), ("return_lse", 1))
    yield from (("num_kv_heads", key.shape[1] + 1), ("num_query_heads", query.shape[1] - 1))
    yield from (("cache_max_len", 0), ("update_cache", int(options["update_cache"])))
    if batch:
        yield from (("new_lens", torch.full((batch,), n, device=device)) for n in (q_len + 1, -1))
    past = options.get("past_key_value")
    if past is None:
        return
    yield "past_key_value", past[:1] if isinstance(past, list) else (past[0],)
    yield "seq_lens", torch.zeros(batch + 1, dtype=torch.int32, device=device)
    yield "seq_lens", torch.zeros(batch, device=device)
    yield "seq_lens", torch.zeros(batch, dtype=torch.int16, device=device)
    if not batch:
        return
    capacity = past[0].shape[2]
    yield from (("seq_lens", torch.full((batch,), n, device=device)) for n in (capacity + 1, -1))
    lens = _lengths(past, options)
    new = options["new_lens"].tolist() if "new_lens" in options else [q_len] * batch
    longest = max(old + more for old, more in zip(lens, new, strict=True))
    if options["update_cache"]:
        if longest > 1:
            yield "cache_max_len", longest - 1
        if capacity > 1 and key.shape[1] * key.shape[3]:
            yield "past_key_value", tuple(buffer[:, :, :1].expand(-1, -1, capacity, -1) for buffer in past)


def _lengths(past: Any, options: dict[str, Any]) -> list[int]:
    given = options.get("seq_lens", getattr(past, "seq_lens", None))
    assert given is not None  # the call is right, so its lengths are known
    return [int(length) for length in given.tolist()]
