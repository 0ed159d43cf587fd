"""Every input the contract refuses: the whole message, nothing written, and the nearest input it accepts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashcore import CacheOverflowError, KVCache, attention, attention_with_kv_cache
from flashcore.fast import attention_production
from tests.tensors import DEVICE, lengths, memory, normal, same_bits

BATCH, HQ, HK, Q_LEN, D, CAPACITY = 2, 4, 2, 3, 16, 8
Q_AXES = "[batch, num_q_heads, q_len, head_dim]"
NEW_AXES = "[batch, num_kv_heads, q_len, head_dim]"
CACHE_AXES = "[batch, num_kv_heads, capacity, head_dim]"
KV_AXES = "[batch, num_kv_heads, kv_len, head_dim]"


def query(batch: int = BATCH, heads: int = HQ, q_len: int = Q_LEN, head_dim: int = D, **kind: Any) -> Tensor:
    return normal(batch, heads, q_len, head_dim, **kind)


def new(batch: int = BATCH, heads: int = HK, q_len: int = Q_LEN, head_dim: int = D, **kind: Any) -> Tensor:
    return normal(batch, heads, q_len, head_dim, seed=1, **kind)


def buffer(batch: int = BATCH, heads: int = HK, capacity: int = CAPACITY, head_dim: int = D, **kind: Any) -> Tensor:
    return normal(batch, heads, capacity, head_dim, seed=2, **kind)


def pair(**sizes: Any) -> tuple[Tensor, Tensor]:
    return buffer(**sizes), buffer(**sizes)


def valid() -> dict[str, Any]:
    """Arguments of a call that is accepted: rows of 2 and 5 cached tokens, in a cache that just holds the new ones."""
    return {
        "query": query(),
        "key": new(),
        "value": new(),
        "past_key_value": pair(),
        "seq_lens": lengths(2, 5),
        "cache_max_len": CAPACITY,
        "is_causal": True,
    }


def valid_attention() -> dict[str, Any]:
    return {"q": query(), "k": buffer(), "v": buffer()}


@dataclass(frozen=True)
class Line:
    """One refusal: what is changed in a valid call, the error, and the change that is just accepted."""

    name: str
    bad: dict[str, Any]
    error: type[Exception]
    message: str
    good: dict[str, Any]


def qkv(**sizes: Any) -> dict[str, Any]:
    """New tokens and a cache of another size or dtype."""
    kind = {name: value for name, value in sizes.items() if name in ("head_dim", "dtype")}
    return {"query": query(**kind), "key": new(**kind), "value": new(**kind), "past_key_value": pair(**kind)}


WITHOUT_CACHE = {"past_key_value": None, "seq_lens": None}
EXPANDED = buffer(capacity=1).expand(BATCH, HK, CAPACITY, D)
# The largest float32 whose float32 product with log2(e) is finite, and the next one.
LARGEST_SCALE = float.fromhex("0x1.62e42ep+127")
TOO_LARGE_SCALE = float.fromhex("0x1.62e430p+127")

TENSORS = [
    Line(
        "query is not a tensor",
        {"query": np.zeros((BATCH, HQ, Q_LEN, D), np.float32)},
        TypeError,
        f"query must be a torch.Tensor {Q_AXES}, got ndarray",
        {"query": torch.from_numpy(np.zeros((BATCH, HQ, Q_LEN, D), np.float32)).to(DEVICE)},
    ),
    Line(
        "value is missing",
        {"value": None},
        TypeError,
        f"value must be a torch.Tensor {NEW_AXES}, got NoneType",
        {"value": new()},
    ),
    Line(
        "query of rank 3",
        {"query": query()[0]},
        ValueError,
        f"query must have 4 dimensions {Q_AXES}, got shape [4, 3, 16]",
        {"query": query()},
    ),
    Line(
        "key of rank 5",
        {"key": new()[None]},
        ValueError,
        f"key must have 4 dimensions {NEW_AXES}, got shape [1, 2, 2, 3, 16]",
        {"key": new()[None][0]},
    ),
    Line(
        "a cache buffer of rank 3",
        {"past_key_value": (buffer(), buffer()[0])},
        ValueError,
        f"past_key_value[1] must have 4 dimensions {CACHE_AXES}, got shape [2, 8, 16]",
        {"past_key_value": (buffer(), buffer())},
    ),
    Line(
        "sparse query",
        {"query": query().to_sparse()},
        TypeError,
        "query must be a dense tensor, got layout torch.sparse_coo",
        {"query": query().to_sparse().to_dense()},
    ),
    Line(
        "float64",
        qkv(dtype=torch.float64),
        TypeError,
        "query must be float16, bfloat16 or float32, got torch.float64",
        qkv(dtype=torch.float32),
    ),
    Line(
        "integers",
        {"value": new().to(torch.int32)},
        TypeError,
        "value must be float16, bfloat16 or float32, got torch.int32",
        {"value": new().to(torch.int32).to(torch.float32)},
    ),
    Line(
        "key of another dtype",
        {"key": new(dtype=torch.float16)},
        TypeError,
        "key must have the dtype of query torch.float32, got torch.float16",
        qkv(dtype=torch.float16),
    ),
    Line(
        "k_cache of another dtype",
        {"past_key_value": (buffer(dtype=torch.bfloat16), buffer())},
        TypeError,
        "past_key_value[0] must have the dtype of query torch.float32, got torch.bfloat16",
        qkv(dtype=torch.bfloat16),
    ),
    Line(
        "v_cache of another dtype",
        {"past_key_value": (buffer(), buffer(dtype=torch.float16))},
        TypeError,
        "past_key_value[1] must have the dtype of query torch.float32, got torch.float16",
        {"past_key_value": pair()},
    ),
    Line(
        "key on another device",
        {"key": new().to("meta")},
        ValueError,
        f"key must be on the device of query {DEVICE}, got meta",
        {"key": new().to(DEVICE)},
    ),
    Line(
        "cache on another device",
        {"past_key_value": (buffer(), buffer().to("meta"))},
        ValueError,
        f"past_key_value[1] must be on the device of query {DEVICE}, got meta",
        {"past_key_value": (buffer(), buffer().to(DEVICE))},
    ),
    Line(
        "everything on a device without kernels",
        {"query": query().to("meta"), "key": new().to("meta"), "value": new().to("meta"), **WITHOUT_CACHE},
        RuntimeError,
        "query must be on a CUDA device, got meta",
        {"query": query().to(DEVICE), "key": new().to(DEVICE), "value": new().to(DEVICE), **WITHOUT_CACHE},
    ),
]

SHAPES = [
    Line(
        "key of another batch",
        {"key": new(batch=1)},
        ValueError,
        f"key must have shape {NEW_AXES} = [2, 2, 3, 16], got [1, 2, 3, 16]",
        {"key": new(batch=2)},
    ),
    Line(
        "key of another length",
        {"key": new(q_len=4)},
        ValueError,
        f"key must have shape {NEW_AXES} = [2, 2, 3, 16], got [2, 2, 4, 16]",
        {"key": new(q_len=3)},
    ),
    Line(
        "key of another head_dim",
        {"key": new(head_dim=15)},
        ValueError,
        f"key must have shape {NEW_AXES} = [2, 2, 3, 16], got [2, 2, 3, 15]",
        {"key": new(head_dim=16)},
    ),
    Line(
        "value unlike key",
        {"value": new(heads=1)},
        ValueError,
        "value must have shape of key = [2, 2, 3, 16], got [2, 1, 3, 16]",
        {"value": new(heads=2)},
    ),
    Line(
        "cache of another number of heads",
        {"past_key_value": pair(heads=1)},
        ValueError,
        f"past_key_value[0] must have shape {CACHE_AXES} = [2, 2, 8, 16], got [2, 1, 8, 16]",
        {"past_key_value": pair(heads=2)},
    ),
    Line(
        "cache of another batch",
        {"past_key_value": pair(batch=3)},
        ValueError,
        f"past_key_value[0] must have shape {CACHE_AXES} = [2, 2, 8, 16], got [3, 2, 8, 16]",
        {"past_key_value": pair(batch=2)},
    ),
    Line(
        "buffers of unequal capacity",
        {"past_key_value": (buffer(), buffer(capacity=7))},
        ValueError,
        f"past_key_value[1] must have shape {CACHE_AXES} = [2, 2, 8, 16], got [2, 2, 7, 16]",
        {"past_key_value": (buffer(), buffer(capacity=8))},
    ),
    Line(
        "head_dim 257",
        {**qkv(head_dim=257), **WITHOUT_CACHE},
        ValueError,
        "query must have a head_dim from 1 to 256, got 257",
        {**qkv(head_dim=256), **WITHOUT_CACHE},
    ),
    Line(
        "head_dim 0",
        {**qkv(head_dim=0), **WITHOUT_CACHE},
        ValueError,
        "query must have a head_dim from 1 to 256, got 0",
        {**qkv(head_dim=1), **WITHOUT_CACHE},
    ),
    Line(
        "query heads not a multiple",
        {"query": query(heads=5)},
        ValueError,
        "query must have a multiple of the 2 heads of key, got 5 heads",
        {"query": query(heads=6)},
    ),
    Line(
        "no query heads",
        {"query": query(heads=0)},
        ValueError,
        "query must have a multiple of the 2 heads of key, got 0 heads",
        {"query": query(heads=2)},
    ),
    Line(
        "no key heads",
        {"key": new(heads=0), "value": new(heads=0)},
        ValueError,
        "key must have at least one head, got 0",
        {"key": new(heads=1), "value": new(heads=1), "past_key_value": pair(heads=1)},
    ),
    Line(
        "num_query_heads disagrees",
        {"num_query_heads": 8},
        ValueError,
        "num_query_heads must equal the number of heads of query 4, got 8",
        {"num_query_heads": 4},
    ),
    Line(
        "num_kv_heads disagrees",
        {"num_kv_heads": 4},
        ValueError,
        "num_kv_heads must equal the number of heads of key 2, got 4",
        {"num_kv_heads": 2},
    ),
]

CACHES = [
    Line(
        "a plain tuple without seq_lens",
        {"seq_lens": None},
        ValueError,
        "seq_lens must be given with a plain (k_cache, v_cache), got None: how many slots are valid cannot be told "
        "from the buffers; pass seq_lens [batch], or the KVCache that the last call returned",
        {"seq_lens": None, "past_key_value": KVCache(*pair(), lengths(2, 5))},
    ),
    Line(
        "a single tensor as cache",
        {"past_key_value": buffer()},
        TypeError,
        "past_key_value must be a KVCache or a pair (k_cache, v_cache), got Tensor",
        {"past_key_value": list(pair())},
    ),
    Line(
        "three buffers",
        {"past_key_value": (*pair(), buffer())},
        ValueError,
        "past_key_value must be a KVCache or a pair (k_cache, v_cache), got 3 elements",
        {"past_key_value": pair()},
    ),
    Line(
        "capacity 0",
        {"past_key_value": pair(capacity=0), "seq_lens": lengths(0, 0)},
        ValueError,
        "past_key_value[0] must have at least one slot, got capacity 0; pass None to start a cache",
        {"past_key_value": pair(capacity=1), "seq_lens": lengths(0, 0)},
    ),
    Line(
        "expanded buffers that would be appended to",
        {"past_key_value": (EXPANDED, EXPANDED)},
        ValueError,
        "past_key_value[0] must not be expanded (two slots would share memory) when update_cache=True, "
        "got strides [32, 16, 0, 1]",
        {"past_key_value": (EXPANDED, EXPANDED), "update_cache": False},
    ),
    Line(
        "KVCache with lengths of another batch",
        {"past_key_value": KVCache(*pair(), lengths(2, 5, 1), max_len=5), "seq_lens": None},
        ValueError,
        "past_key_value.seq_lens must have shape [batch] = [2], got [3]",
        {"past_key_value": KVCache(*pair(), lengths(2, 5), max_len=5), "seq_lens": None},
    ),
    Line(
        "KVCache that claims more than its capacity",
        {
            "past_key_value": KVCache(*pair(), lengths(2, 9), max_len=9),
            "seq_lens": None,
            "update_cache": False,
        },
        ValueError,
        "seq_lens[1] must lie in [0, 8], the capacity of the cache, got 9",
        {
            "past_key_value": KVCache(*pair(), lengths(2, 8), max_len=8),
            "seq_lens": None,
            "update_cache": False,
        },
    ),
]


def counts(name: str, valid_value: int) -> list[Line]:
    """The lines of an argument that counts slots."""
    good = {name: valid_value, **WITHOUT_CACHE}
    return [
        Line(f"{name} {bad}", {name: bad, **WITHOUT_CACHE}, ValueError, f"{name} must be at least 1, got {bad}", good)
        for bad in (0, -1)
    ] + [
        Line(f"{name} {bad!r}", {name: bad}, TypeError, f"{name} must be an int, got {bad!r}", {name: CAPACITY})
        for bad in (8.0, None, True, "8")
    ]


def tiles(name: str) -> list[Line]:
    """The lines of a forced tile."""
    return [
        Line(
            f"{name} {bad}",
            {name: bad},
            ValueError,
            f"{name} must be a power of two from 16 to 256, got {bad}",
            {name: good},
        )
        for bad, good in [(0, 16), (-16, 16), (8, 16), (48, 64), (512, 256)]
    ] + [
        Line(f"{name} {bad!r}", {name: bad}, TypeError, f"{name} must be an int or None, got {bad!r}", {name: 16})
        for bad in (16.0, True, "16")
    ]


def flags(name: str) -> list[Line]:
    """The lines of a flag."""
    return [
        Line(f"{name} {bad!r}", {name: bad}, TypeError, f"{name} must be a bool, got {bad!r}", {name: True})
        for bad in (1, None)
    ]


def scales() -> list[Line]:
    """The lines of the scale: it has to survive the way the kernel uses it."""
    finite = "scale must be finite, also as float32 times log2(e), got "
    zeros = {"query": torch.zeros_like(query())}  # so that the largest scale has finite logits
    largest = {"scale": LARGEST_SCALE, **zeros}
    return [
        Line("scale inf", {"scale": np.inf}, ValueError, finite + "inf", largest),
        Line("scale -inf", {"scale": -np.inf}, ValueError, finite + "-inf", {"scale": -LARGEST_SCALE, **zeros}),
        Line("scale nan", {"scale": np.nan}, ValueError, finite + "nan", {"scale": 0.0}),
        Line("scale overflows float32", {"scale": 1e39}, ValueError, finite + "1e+39", largest),
        Line("scale overflows float64", {"scale": 10**400}, ValueError, finite + "inf", largest),
        Line(
            "scale overflows after log2(e)",
            {"scale": TOO_LARGE_SCALE},
            ValueError,
            finite + repr(TOO_LARGE_SCALE),
            largest,
        ),
        Line("scale is text", {"scale": "1"}, TypeError, "scale must be a float or None, got '1'", {"scale": 1}),
        Line("scale is a flag", {"scale": True}, TypeError, "scale must be a float or None, got True", {"scale": None}),
    ]


def lens(name: str, upper: int, meaning: str) -> list[Line]:
    """The lines of a tensor of lengths, whose largest valid value is ``upper``."""
    # Rows that reach the upper limit only fit in the cache if they are not stored.
    reading = {"update_cache": False}
    accepted = {name: lengths(0, upper), **reading}
    bounds = f"must lie in [0, {upper}], {meaning}, got"
    lines = [
        Line(
            f"{name} is a list",
            {name: [1, 2]},
            TypeError,
            f"{name} must be a torch.Tensor [batch] of int32 or int64, got list",
            {name: lengths(1, 2)},
        ),
        Line(
            f"{name} is float32",
            {name: lengths(1, 2).float()},
            TypeError,
            f"{name} must be int32 or int64, got torch.float32",
            {name: lengths(1, 2).float().long()},
        ),
        Line(
            f"{name} is bool",
            {name: lengths(1, 0).bool()},
            TypeError,
            f"{name} must be int32 or int64, got torch.bool",
            {name: lengths(1, 0).bool().int()},
        ),
        Line(
            f"{name} of another batch",
            {name: lengths(1)},
            ValueError,
            f"{name} must have shape [batch] = [2], got [1]",
            {name: lengths(1, 1)},
        ),
        Line(
            f"{name} of rank 2",
            {name: lengths(1, 2)[None]},
            ValueError,
            f"{name} must have shape [batch] = [2], got [1, 2]",
            {name: lengths(1, 2)[None][0]},
        ),
        Line(
            f"{name} on another device",
            {name: lengths(1, 2).to("meta")},
            ValueError,
            f"{name} must be on the device of query {DEVICE}, got meta",
            {name: lengths(1, 2).to(DEVICE)},
        ),
    ]
    for row, bad in [(0, -1), (1, -1), (0, upper + 1), (1, upper + 1), (1, 2**32 + 1)]:
        values = [0, 0]
        values[row] = bad
        lines.append(
            Line(
                f"{name} {bad} in row {row}",
                {name: lengths(*values, dtype=torch.int64), **reading},
                ValueError,
                f"{name}[{row}] {bounds} {bad}",
                accepted,
            )
        )
    if DEVICE.type == "cuda":
        lines.append(
            Line(
                f"{name} on the CPU",
                {name: lengths(1, 2).cpu()},
                ValueError,
                f"{name} must be on the device of query {DEVICE}, got cpu",
                {name: lengths(1, 2)},
            )
        )
    return lines


SCALARS = [
    *counts("cache_max_len", Q_LEN),
    *tiles("block_m"),
    *tiles("block_n"),
    *scales(),
    *flags("update_cache"),
    *flags("is_causal"),
    *flags("return_lse"),
]

LENGTHS = [
    *lens("seq_lens", CAPACITY, "the capacity of the cache"),
    *lens("new_lens", Q_LEN, "q_len"),
    Line(
        "seq_lens without a cache",
        {"past_key_value": None, "seq_lens": lengths(0, 1)},
        ValueError,
        "seq_lens[1] must lie in [0, 0], no cache was given, got 1",
        {"past_key_value": None, "seq_lens": lengths(0, 0)},
    ),
]

LINES = [*TENSORS, *SHAPES, *CACHES, *SCALARS, *LENGTHS]

ATTENTION_LINES = [
    Line(
        "q of rank 3",
        {"q": query()[0]},
        ValueError,
        f"q must have 4 dimensions {Q_AXES}, got shape [4, 3, 16]",
        {"q": query()},
    ),
    Line(
        "k of another dtype",
        {"k": buffer(dtype=torch.float16)},
        TypeError,
        "k must have the dtype of q torch.float32, got torch.float16",
        {"k": buffer(dtype=torch.float32)},
    ),
    Line(
        "v on another device",
        {"v": buffer().to("meta")},
        ValueError,
        f"v must be on the device of q {DEVICE}, got meta",
        {"v": buffer()},
    ),
    Line(
        "q on a device without kernels",
        {"q": query().to("meta"), "k": buffer().to("meta"), "v": buffer().to("meta")},
        RuntimeError,
        "q must be on a CUDA device, got meta",
        {"q": query(), "k": buffer(), "v": buffer()},
    ),
    Line(
        "k of another batch",
        {"k": buffer(batch=1)},
        ValueError,
        f"k must have shape {KV_AXES} = [2, 2, 8, 16], got [1, 2, 8, 16]",
        {"k": buffer(batch=2)},
    ),
    Line(
        "v unlike k",
        {"v": buffer(capacity=7)},
        ValueError,
        "v must have shape of k = [2, 2, 8, 16], got [2, 2, 7, 16]",
        {"v": buffer(capacity=8)},
    ),
    Line(
        "head_dim 257",
        {"q": query(head_dim=257), "k": buffer(head_dim=257), "v": buffer(head_dim=257)},
        ValueError,
        "q must have a head_dim from 1 to 256, got 257",
        {"q": query(head_dim=255), "k": buffer(head_dim=255), "v": buffer(head_dim=255)},
    ),
    Line(
        "query heads not a multiple",
        {"q": query(heads=3)},
        ValueError,
        "q must have a multiple of the 2 heads of k, got 3 heads",
        {"q": query(heads=2)},
    ),
    Line(
        "block_n 24",
        {"block_n": 24},
        ValueError,
        "block_n must be a power of two from 16 to 256, got 24",
        {"block_n": 32},
    ),
    Line(
        "scale inf",
        {"scale": np.inf},
        ValueError,
        "scale must be finite, also as float32 times log2(e), got inf",
        {"scale": 1.0},
    ),
    *flags("is_causal"),
    *flags("return_lse"),
]


def names(lines: list[Line]) -> list[str]:
    return [line.name for line in lines]


def assert_refused(function: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """The call raises exactly this, and every byte behind its arguments is as before."""
    before = memory(arguments)

    with pytest.raises(error) as caught:
        function(**arguments)

    assert type(caught.value) is error
    assert str(caught.value) == message
    assert memory(arguments) == before


@pytest.mark.parametrize("line", LINES, ids=names(LINES))
def test_a_bad_argument_is_named_and_nothing_is_written(line: Line) -> None:
    assert_refused(attention_with_kv_cache, {**valid(), **line.bad}, line.error, line.message)


@pytest.mark.parametrize("line", LINES, ids=names(LINES))
def test_the_nearest_good_argument_is_accepted(line: Line) -> None:
    arguments = {**valid(), **line.good}

    out = attention_with_kv_cache(**arguments)[0]

    assert out.shape == arguments["query"].shape
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("line", ATTENTION_LINES, ids=names(ATTENTION_LINES))
def test_attention_names_its_own_arguments(line: Line) -> None:
    assert_refused(attention, {**valid_attention(), **line.bad}, line.error, line.message)


@pytest.mark.parametrize("line", ATTENTION_LINES, ids=names(ATTENTION_LINES))
def test_attention_accepts_the_nearest_good_argument(line: Line) -> None:
    arguments = {**valid_attention(), **line.good}

    result = attention(**arguments)

    out = result[0] if isinstance(result, tuple) else result
    assert out.shape == arguments["q"].shape
    assert torch.isfinite(out).all()


def valid_repetition() -> dict[str, Any]:
    """Arguments of a decode step whose launch the cache remembers: an equal step has just been made."""
    buffers = buffer(capacity=16), buffer(capacity=16)
    step: dict[str, Any] = {"query": query(), "key": new(), "value": new(), "cache_max_len": 16}
    cache: KVCache | None = KVCache(*buffers, lengths(2, 5), max_len=5)
    for _ in range(2):
        cache = attention_with_kv_cache(**step, past_key_value=cache)[1]
    return {**step, "past_key_value": cache}


REPEATED = [
    *(line for line in LINES if not line.bad.keys() & {"past_key_value", "seq_lens", "new_lens"}),
    Line("no hash", {"scale": [0.5]}, TypeError, "scale must be a float or None, got [0.5]", {"scale": 0.5}),
]


@pytest.mark.parametrize("line", REPEATED, ids=names(REPEATED))
def test_a_step_like_the_last_one_is_checked_too(line: Line) -> None:
    assert_refused(attention_with_kv_cache, {**valid_repetition(), **line.bad}, line.error, line.message)


def test_a_step_like_the_last_one_is_checked_for_inputs_that_require_grad() -> None:
    arguments = valid_repetition()
    arguments["past_key_value"][1].requires_grad_()

    assert_refused(
        attention_with_kv_cache,
        arguments,
        ValueError,
        "past_key_value[1] must not require grad while grad is enabled, got requires_grad=True; "
        "flashcore is forward only: call it under torch.no_grad() or detach the input",
    )


def test_a_step_like_the_last_one_is_checked_for_lengths_on_another_device() -> None:
    arguments = valid_repetition()
    cache = arguments["past_key_value"]
    arguments["past_key_value"] = KVCache(cache[0], cache[1], cache.seq_lens.to("meta"), max_len=11, like=cache)

    assert_refused(
        attention_with_kv_cache,
        arguments,
        ValueError,
        f"past_key_value.seq_lens must be on the device of query {DEVICE}, got meta",
    )


@pytest.mark.parametrize("line", LINES, ids=names(LINES))
def test_messages_have_one_form(line: Line) -> None:
    assert re.match(r"[a-z_]+(\[\d\])?(\.seq_lens)? must .*, got .", line.message)


@pytest.mark.parametrize("name", ["query", "key", "value", "past_key_value[0]", "past_key_value[1]"])
def test_inputs_that_require_grad_are_refused_while_grad_is_enabled(name: str) -> None:
    arguments = valid()
    argument, _, index = name.partition("[")
    tensor = arguments[argument][int(index[0])] if index else arguments[argument]
    tensor.requires_grad_()

    assert_refused(
        attention_with_kv_cache,
        arguments,
        ValueError,
        f"{name} must not require grad while grad is enabled, got requires_grad=True; "
        "flashcore is forward only: call it under torch.no_grad() or detach the input",
    )
    with torch.no_grad():
        out = attention_with_kv_cache(**arguments)[0]

    assert not out.requires_grad


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_attention_refuses_inputs_that_require_grad(name: str) -> None:
    arguments = valid_attention()
    arguments[name].requires_grad_()

    assert_refused(
        attention,
        arguments,
        ValueError,
        f"{name} must not require grad while grad is enabled, got requires_grad=True; "
        "flashcore is forward only: call it under torch.no_grad() or detach the input",
    )
    with torch.no_grad():
        attention(**arguments)


def widened(values: Tensor) -> Tensor:
    return values.to(torch.int64)


def strided(values: Tensor) -> Tensor:
    """The same lengths in every third element; the gaps hold lengths that would be wrong."""
    padded = torch.full((3 * len(values),), 1, dtype=values.dtype, device=values.device)
    padded[::3] = values
    return padded[::3]


def strided_and_widened(values: Tensor) -> Tensor:
    return strided(widened(values))


def reversed_in_memory(values: Tensor) -> Tensor:
    """A misaligned view: the lengths start one element into their memory."""
    return torch.cat([values.new_ones(1), values])[1:]


def with_lse(**arguments: Any) -> tuple[Tensor, KVCache, Tensor]:
    result: Any = attention_with_kv_cache(**arguments, return_lse=True)
    out, cache, lse = result
    return out, cache, lse


@pytest.mark.parametrize("layout", [widened, strided, strided_and_widened, reversed_in_memory])
@pytest.mark.parametrize("name", ["seq_lens", "new_lens"])
def test_lengths_of_any_integer_type_and_stride_give_the_same_bits(name: str, layout: Any) -> None:
    plain = {**valid(), "new_lens": lengths(2, 3)}
    other = {**valid(), "new_lens": lengths(2, 3)}
    other[name] = layout(other[name])

    out, cache, lse = with_lse(**plain)
    other_out, other_cache, other_lse = with_lse(**other)

    assert same_bits(out, other_out)
    assert same_bits(lse, other_lse)
    assert all(same_bits(a, b) for a, b in zip(cache, other_cache, strict=True))
    assert cache.seq_lens.tolist() == other_cache.seq_lens.tolist() == [4, 8]
    assert cache.seq_lens.dtype == other_cache.seq_lens.dtype == torch.int32


def test_expanded_lengths_are_one_length_for_every_row() -> None:
    arguments = {**valid(), "seq_lens": lengths(5).expand(BATCH)}

    cache = attention_with_kv_cache(**arguments)[1]

    assert cache is not None
    assert cache.seq_lens.tolist() == [8, 8]


STARTS = ["a tuple with seq_lens", "a KVCache", "a KVCache with a bound", "a KVCache that was rolled back"]


def ragged(start: str, cached: list[int]) -> dict[str, Any]:
    """A cache of three rows, given in one of the ways a cache can be given."""
    buffers = pair(batch=3, capacity=16)
    past: Any = buffers
    seq_lens: Tensor | None = None
    if start == "a tuple with seq_lens":
        seq_lens = lengths(*cached)
    elif start == "a KVCache":
        past = KVCache(*buffers, lengths(*cached))
    elif start == "a KVCache with a bound":
        past = KVCache(*buffers, lengths(*cached), max_len=12)
    else:
        past, seq_lens = KVCache(*buffers, lengths(12, 12, 12), max_len=12), lengths(*cached)
    return {
        "query": query(batch=3, q_len=4),
        "key": new(batch=3, q_len=4),
        "value": new(batch=3, q_len=4),
        "past_key_value": past,
        "seq_lens": seq_lens,
        "cache_max_len": 10,
    }


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("start", STARTS)
def test_one_slot_too_many_in_any_row_overflows_and_writes_nothing(start: str, row: int) -> None:
    cached, new_lens = [2, 0, 1], [4, 1, 3]
    cached[row] = 10 - new_lens[row] + 1
    arguments = {**ragged(start, cached), "new_lens": lengths(*new_lens)}

    assert_refused(
        attention_with_kv_cache,
        arguments,
        CacheOverflowError,
        f"row {row} holds {cached[row]} tokens and {new_lens[row]} new ones do not fit in cache_max_len=10; "
        "nothing was written: raise cache_max_len to 11 or more, or drop tokens from the row first",
    )


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("start", STARTS)
def test_the_last_slot_can_be_used_in_any_row(start: str, row: int) -> None:
    cached, new_lens = [2, 0, 1], [4, 1, 3]
    cached[row] = 10 - new_lens[row]
    arguments = {**ragged(start, cached), "new_lens": lengths(*new_lens)}

    cache = attention_with_kv_cache(**arguments)[1]

    assert cache is not None
    assert cache.seq_lens.tolist() == [c + n for c, n in zip(cached, new_lens, strict=True)]
    assert cache.seq_lens[row] == 10


def test_overflow_of_several_rows_names_the_first() -> None:
    arguments = ragged("a KVCache", [0, 9, 9])

    with pytest.raises(CacheOverflowError, match=r"^row 1 holds 9 tokens and 4 new ones"):
        attention_with_kv_cache(**arguments)


def test_without_updating_nothing_overflows() -> None:
    arguments = {**ragged("a KVCache", [9, 9, 9]), "update_cache": False}
    before = memory(arguments)

    out, cache = attention_with_kv_cache(**arguments)[:2]

    assert cache is None
    assert torch.isfinite(out).all()
    assert memory(arguments) == before


@pytest.mark.parametrize("name", ["seq_lens", "new_lens"])
def test_a_graph_takes_lengths_only_where_something_can_report_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording cannot wait for lengths, and with update_cache=False only a KVCache given could say they were bad."""
    monkeypatch.setattr(attention_production, "_is_capturing", lambda _: True)
    arguments = {**valid(), "update_cache": False}
    if name == "new_lens":
        arguments |= {**WITHOUT_CACHE, "new_lens": lengths(1, 3)}
    given = "tuple" if name == "seq_lens" else "NoneType"

    assert_refused(
        attention_with_kv_cache,
        arguments,
        ValueError,
        "past_key_value must be a KVCache where lengths are given to a call with update_cache=False recorded in a CUDA "
        f"graph, got {given}: nothing else could report a length out of range",
    )
    cache = KVCache(*pair(), lengths(2, 5), max_len=5)
    assert attention_with_kv_cache(**{**arguments, "past_key_value": cache, "seq_lens": None})[1] is None
    assert attention_with_kv_cache(**{**arguments, **WITHOUT_CACHE, "new_lens": None})[1] is None


def first_call(q_len: int) -> dict[str, Any]:
    return {
        "query": query(q_len=q_len),
        "key": new(q_len=q_len),
        "value": new(q_len=q_len),
        "cache_max_len": 8,
    }


def test_a_first_call_longer_than_cache_max_len_overflows() -> None:
    assert_refused(
        attention_with_kv_cache,
        first_call(9),
        CacheOverflowError,
        "row 0 holds 0 tokens and 9 new ones do not fit in cache_max_len=8; nothing was written: "
        "raise cache_max_len to 9 or more, or drop tokens from the row first",
    )


def test_a_first_call_may_fill_the_cache() -> None:
    cache = attention_with_kv_cache(**first_call(8))[1]

    assert cache is not None
    assert cache.seq_lens.tolist() == [8, 8]


CALL_ON_THE_CPU = """
import torch, flashcore
{late}
x = torch.ones(1, 1, 2, 16)
for call in (lambda: flashcore.attention(x, x, x), lambda: flashcore.attention_with_kv_cache(x, x, x, cache_max_len=2)):
    try:
        call()
        print("accepted")
    except RuntimeError as error:
        print(type(error).__name__, error)
"""
NEEDS_THE_INTERPRETER = (
    "RuntimeError {name} must be on a CUDA device unless Triton's interpreter is on, got cpu; "
    "to run on the CPU set TRITON_INTERPRET=1 in the environment before importing flashcore"
)


@pytest.mark.parametrize(
    ("interpret", "late", "answers"),
    [
        pytest.param("0", "", [NEEDS_THE_INTERPRETER.format(name=n) for n in ("q", "query")], id="without it"),
        pytest.param("1", "", ["accepted", "accepted"], id="with it"),
        pytest.param(
            "0",
            "import os; os.environ['TRITON_INTERPRET'] = '1'",
            [NEEDS_THE_INTERPRETER.format(name=n) for n in ("q", "query")],
            id="switched on too late",
        ),
    ],
)
def test_cpu_tensors_need_the_interpreter(interpret: str, late: str, answers: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALL_ON_THE_CPU.format(late=late)],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.splitlines() == answers, done.stderr
