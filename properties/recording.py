"""Calls made without the runner: captured in a CUDA graph (which needs CUDA) or as if, or repeated many times."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from properties import device as devices
from properties.assertions import Got, LawViolation
from properties.case import Case
from properties.guards import bits_of, tensor_of, torch_dtype
from properties.schedule import problem
from properties.subjects import Subject

Tensors = dict[str, Any]


def _tensors(case: Case) -> tuple[Tensors, Tensors]:
    """The arguments of the first call, and its cache: lengths in tensors of their own."""
    given = problem(case)
    step, dtype = given.steps[0], torch_dtype(case.dtype)
    assert given.initial is not None
    arguments = {name: tensor_of(getattr(step, name), dtype, devices.current()) for name in ("query", "key", "value")}
    arguments["new_lens"] = torch.tensor(step.new_lens, dtype=torch.int32, device=devices.current())
    cache = {
        "k": tensor_of(given.initial.key, dtype, devices.current()),
        "v": tensor_of(given.initial.value, dtype, devices.current()),
        "seq_lens": torch.tensor(step.seq_lens, dtype=torch.int32, device=devices.current()),
    }
    return arguments, cache


def _call(case: Case, subject: Subject, arguments: Tensors, cache: Any, *, update_cache: bool = True) -> Any:
    options = {name: getattr(case, name) for name in ("scale", "block_m", "block_n")}
    with subject.forced(case):
        return subject.attention_with_kv_cache(
            **arguments,
            past_key_value=cache,
            cache_max_len=case.cache_max_len,
            is_causal=case.is_causal,
            update_cache=update_cache,
            return_lse=True,
            **{name: value for name, value in options.items() if value is not None},
        )


def _got(case: Case, out: torch.Tensor, lse: torch.Tensor) -> Got:
    bits = [np.ascontiguousarray(bits_of(tensor)) for tensor in (out, lse)]
    return Got(bits[0], bits[1], case.dtype, case, is_transformed=True)


def replayed(case: Case, subject: Subject) -> Iterator[tuple[Got, Got]]:
    """A call replayed and made, with the case's numbers, then with rows cut short, then with other numbers."""
    assert subject.make_cache is not None
    arguments, cache = _tensors(case)
    k, v, lens = cache["k"], cache["v"], cache["seq_lens"]
    _call(case, subject, arguments, subject.make_cache(k.clone(), v.clone(), lens.clone()))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    recorded_cache = subject.make_cache(k, v, lens)
    with torch.cuda.graph(graph):
        out, recorded, lse = _call(case, subject, arguments, recorded_cache)

    for change in ("none", "lengths", "numbers"):
        if change == "lengths":
            lens //= 2
        if change == "numbers":
            arguments["query"].neg_()
            arguments["value"].neg_()
        eager_cache = subject.make_cache(k.clone(), v.clone(), lens.clone())
        eager_out, stored, eager_lse = _call(case, subject, arguments, eager_cache)
        graph.replay()
        torch.cuda.synchronize()
        graphed, eager = _got(case, out, lse), _got(case, eager_out, eager_lse)
        if graphed.out.size:
            yield graphed, eager
        # The caches as if they were outputs: every slot, then the lengths.
        for one, other in ((recorded[0], stored[0]), (recorded[1], stored[1])):
            lengths = [tensor.seq_lens.reshape(-1, 1, 1) for tensor in (recorded, stored)]
            yield _got(case, one, lengths[0]), _got(case, other, lengths[1])


def with_a_bad_length(case: Case, subject: Subject) -> Iterator[tuple[Got, Got]]:
    """One row's length is wrong in a call whose lengths the host may not see; by the seed which row, and how.

    Yields the other rows' results, and what all slots and lengths hold, beside what they should.

    Raises:
        LawViolation: the cache does not report the row, or reports it for ever.
    """
    assert subject.make_cache is not None
    assert subject.unseen is not None
    arguments, cache = _tensors(case)
    buffers, lens, appends = (cache["k"], cache["v"]), cache["seq_lens"], case.steps[0].update_cache
    new = arguments["new_lens"].tolist()
    row, kind = case.seed % len(new), case.seed // len(new) % 3
    capacity = buffers[0].shape[2]
    too_long = min(capacity, case.cache_max_len) + 1 - new[row]
    does_not_fit = appends and kind == 0 and new[row] > 0
    bad = lens.clone()
    bad[row] = too_long if does_not_fit else capacity + 1 if kind < 2 else -1

    seen, unseen = (subject.make_cache(*(buffer.clone() for buffer in buffers), given.clone()) for given in (lens, bad))
    out, stored, lse = _call(case, subject, arguments, seen, update_cache=appends)
    with subject.unseen():
        blind_out, blind, blind_lse = _call(case, subject, arguments, unseen, update_cache=appends)
    if not appends:
        stored, blind = seen, unseen
    others = [other for other in range(len(new)) if other != row]
    if others:
        yield _got(case, blind_out[others], blind_lse[others]), _got(case, out[others], lse[others])
    expected_lens = stored.seq_lens.clone()
    expected_lens[row] = bad[row].clamp(0, capacity) if appends else bad[row]
    for held, buffer, before in zip(blind, stored, buffers, strict=True):
        expected = buffer.clone()
        expected[row] = before[row]
        lengths = [tensor.reshape(-1, 1, 1) for tensor in (blind.seq_lens, expected_lens)]
        yield _got(case, held, lengths[0]), _got(case, expected, lengths[1])
    _assert_reported(blind, row, subject.overflow_error if does_not_fit else ValueError)


def _assert_reported(cache: Any, row: int, error: type[Exception]) -> None:
    """The cache names the row once, as that error, and then no more."""
    try:
        cache.check()
    except error as said:
        if not re.search(rf"\b{row}\b", str(said)):
            raise LawViolation("report", f"row {row} had a bad length, and the report names another: {said}") from said
    else:
        raise LawViolation("report", f"row {row} had a bad length, and no {error.__name__} reported it")
    try:
        cache.check()
    except error as again:
        raise LawViolation("report", f"a fault was reported twice: {again}") from again


def repeated(case: Case, subject: Subject, times: int) -> Iterator[tuple[Got, Got]]:
    """The first result of a call beside every other one that differs from it; itself if none does."""
    if not case.rows or case.op == "attention":
        return
    arguments, cache = _tensors(case)
    buffers, lens = (cache["k"], cache["v"]), cache["seq_lens"]
    first_out, _, first_lse = _call(case, subject, {**arguments, "seq_lens": lens}, buffers)
    first = _got(case, first_out, first_lse)
    if not first.out.size:
        return
    yield first, first
    for _ in range(times - 1):
        out, _, lse = _call(case, subject, {**arguments, "seq_lens": lens}, buffers)
        same = torch.equal(_bits(out), _bits(first_out)) and torch.equal(_bits(lse), _bits(first_lse))
        if not same:
            yield first, _got(case, out, lse)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
