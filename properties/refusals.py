"""Calls with one thing wrong, made from one that is right: each must raise before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from properties.assertions import LawViolation, describe
from properties.case import MAX_HEAD_DIM, Case
from properties.subjects import Subject

Options = dict[str, Any]
Arguments = tuple[list[torch.Tensor], Options]
_OTHER_DTYPE = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16, torch.float32: torch.float16}
_NAMES = ("query", "key", "value")


def among_malformed(subject: Subject, case: Case) -> Subject:
    """Before every call, and after it, come others with one thing wrong."""

    def wrap(function: Callable[..., Any], changes: Callable[..., Iterator[tuple[str, Arguments]]]) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            assert_refused(tensors, options)
            result = function(*tensors, **options)
            assert_refused(tensors, options)
            return result

        def assert_refused(tensors: tuple[torch.Tensor, ...], options: Options) -> None:
            for what, (changed, others) in changes(tensors, options):
                try:
                    with torch.enable_grad():
                        _look_at(function(*changed, **others), others)
                except (TypeError, ValueError, subject.overflow_error):
                    continue
                raise LawViolation("accepted", f"a call with {what} was accepted\n  case: {describe(case)}", case)

        return call

    def with_cache(tensors: tuple[torch.Tensor, ...], options: Options) -> Iterator[tuple[str, Arguments]]:
        yield from malformed(tensors, options)
        if options.get("past_key_value") is not None:
            yield from _malformed_caches(tensors, options, subject.make_cache)

    return replace(
        subject,
        attention_with_kv_cache=wrap(subject.attention_with_kv_cache, with_cache),
        attention=None if subject.attention is None else wrap(subject.attention, malformed),
        is_disturbed=True,
    )


def malformed(tensors: tuple[torch.Tensor, ...], options: Options) -> Iterator[tuple[str, Arguments]]:
    """What is wrong, and the call: of every kind that the call has room for, its cache aside."""
    query, key, _ = tensors
    has_cache = "cache_max_len" in options
    for position, name in enumerate(_NAMES):
        given = tensors[position]
        for what, other in _other_tensors(name, given):
            # Without a cache there may be more queries than keys.
            if what != "query of other tokens" or has_cache:
                yield what, ([*tensors[:position], other, *tensors[position + 1 :]], options)
        grad = given.detach().clone().requires_grad_()
        yield f"{name} that requires grad", ([*tensors[:position], grad, *tensors[position + 1 :]], options)
    if key.shape[1] > 1:
        yield "an odd number of query heads", ([torch.cat([query, query[:, :1]], 1), *tensors[1:]], options)
    fresh = {name: value for name, value in options.items() if name not in ("past_key_value", "seq_lens")}
    wide = [tensor.new_zeros(*tensor.shape[:3], MAX_HEAD_DIM + 1) for tensor in tensors]
    yield "more columns than there may be", (wide, fresh)
    yield "no key head", ([query, *(tensor[:, :0] for tensor in tensors[1:])], fresh)
    yield "a sparse query", ([query.to_sparse(), *tensors[1:]], options)
    for name, value in _malformed_options(tensors, options):
        yield (
            f"{name}={value}" if hasattr(value, "dtype") else f"{name}={value!r}",
            (
                list(tensors),
                {**options, name: value},
            ),
        )


def _other_tensors(name: str, given: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, changed in one thing in which it has to be like the others."""
    yield f"{name} of another dtype", given.to(_OTHER_DTYPE[given.dtype])
    for what, other in (
        ("of another rank", given[0] if given.shape[0] else given[None]),
        ("of twice the columns", torch.cat([given, given], 3)),
        ("of other tokens", torch.cat([given, given[:, :, :1]], 2)),
        ("of another batch", torch.cat([given, given[:1]], 0)),
    ):
        if other.shape != given.shape:
            yield f"{name} {what}", other


def _malformed_options(tensors: tuple[torch.Tensor, ...], options: Options) -> Iterator[tuple[str, Any]]:
    query, key, _ = tensors
    batch, q_len, device = query.shape[0], query.shape[2], query.device
    yield from (("scale", float("inf")), ("scale", float("nan")), ("scale", True), ("scale", "1"))
    yield from (("block_m", 0), ("block_n", 24), ("is_causal", int(options["is_causal"])), ("return_lse", 1))
    if "cache_max_len" not in options:
        return
    yield from (("num_kv_heads", key.shape[1] + 1), ("num_query_heads", query.shape[1] - 1))
    yield from (("cache_max_len", 0), ("update_cache", int(options["update_cache"])))
    if batch:
        yield from (("new_lens", torch.full((batch,), n, device=device)) for n in (q_len + 1, -1))


def _malformed_caches(
    tensors: tuple[torch.Tensor, ...], options: Options, make_cache: Callable[..., Any] | None
) -> Iterator[tuple[str, Arguments]]:
    """The same for the cache, its lengths and its limit."""
    query, key, _ = tensors
    batch, q_len = query.shape[0], query.shape[2]
    past, lengths = options["past_key_value"], _lengths(options)
    capacity = past[0].shape[2]

    def with_options(what: str, **changed: Any) -> tuple[str, Arguments]:
        return what, (list(tensors), {**options, **changed})

    yield with_options("one buffer", past_key_value=past[:1] if isinstance(past, list) else (past[0],))
    for position, name in enumerate(("keys", "values")):
        for what, other in _other_tensors(f"a buffer of {name}", past[position]):
            pair = (other, past[1]) if position == 0 else (past[0], other)
            yield with_options(what, past_key_value=pair, seq_lens=lengths)
    wrong = [
        torch.zeros(batch + 1, dtype=torch.int32, device=query.device),
        lengths.to(torch.float32),
        lengths.to(torch.int16),
        *([torch.full_like(lengths, n) for n in (capacity + 1, -1)] if batch else []),
    ]
    for other in wrong:
        yield with_options(f"seq_lens={other}", seq_lens=other)
        if make_cache is not None:
            held = {name: value for name, value in options.items() if name != "seq_lens"}
            held["past_key_value"] = make_cache(*past, other)
            yield f"a cache that holds the lengths {other}", (list(tensors), held)
    if not batch or not options["update_cache"]:
        return
    new = options["new_lens"].tolist() if "new_lens" in options else [q_len] * batch
    longest = max(old + more for old, more in zip(lengths.tolist(), new, strict=True))
    if longest > 1:
        yield with_options(f"cache_max_len={longest - 1}", cache_max_len=longest - 1)
    if capacity > 1 and key.shape[1] * key.shape[3]:
        expanded = tuple(buffer[:, :, :1].expand(-1, -1, capacity, -1) for buffer in past)
        yield with_options("an expanded cache", past_key_value=expanded, seq_lens=lengths)


def _lengths(options: Options) -> torch.Tensor:
    given = options.get("seq_lens", getattr(options["past_key_value"], "seq_lens", None))
    assert isinstance(given, torch.Tensor)  # the call is right, so its lengths are known
    return given


def _look_at(result: Any, options: Options) -> None:
    """Lengths that only the device reads are refused when the cache is next looked at."""
    returned = result[1] if isinstance(result, tuple) and len(result) > 1 else None
    for cache in (returned, options.get("past_key_value")):
        getattr(cache, "check", lambda: None)()
