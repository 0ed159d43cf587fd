"""What makes one call like another, and where repeated calls put their lengths."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from flashcore import KVCache, attention_with_kv_cache
from flashcore.fast import buffers, length_rows, relaunch, tuning
from tests.tensors import DEVICE, normal

SHAPE = (2, 3, 1, 8)


@pytest.fixture(params=["by torch.compile's guards", "by their attributes"])
def likeness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., bool]]:
    """``likeness`` with the guards, and without."""
    if request.param == "by their attributes":
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    return relaunch.likeness


def test_tensors_like_the_first_are_alike(likeness: Callable[..., Callable[..., bool]]) -> None:
    are_alike = likeness(normal(*SHAPE), normal(*SHAPE))

    assert are_alike(normal(*SHAPE, seed=1), normal(*SHAPE, seed=2))
    with torch.no_grad():
        assert are_alike(normal(*SHAPE), normal(*SHAPE))


def test_one_tensor_may_come_twice(likeness: Callable[..., Callable[..., bool]]) -> None:
    tensor = normal(*SHAPE)

    assert likeness(tensor, tensor)(tensor, tensor)


@pytest.mark.parametrize(
    "other",
    [
        normal(2, 3, 2, 8),
        normal(3, 2, 1, 8).transpose(0, 1),
        normal(*SHAPE, dtype=torch.float16),
        normal(*SHAPE).to("meta"),
        normal(*SHAPE).requires_grad_(),
        torch.nn.Parameter(normal(*SHAPE), requires_grad=False),
        normal(*SHAPE).tolist(),
        None,
    ],
    ids=["shape", "strides", "dtype", "device", "grad", "type", "list", "nothing"],
)
def test_a_difference_in_one_tensor_is_seen(likeness: Callable[..., Callable[..., bool]], other: Tensor | None) -> None:
    are_alike = likeness(normal(*SHAPE), normal(*SHAPE))

    assert not are_alike(other, normal(*SHAPE))
    assert not are_alike(normal(*SHAPE), other)


def decode(past: KVCache, steps: int) -> list[KVCache]:
    """The caches after so many decode steps, one row of 1 head."""
    caches = []
    for step in range(steps):
        new = normal(1, 1, 1, 16, seed=step)
        past = cast(KVCache, attention_with_kv_cache(new, new, new, past, cache_max_len=256)[1])
        caches.append(past)
    return caches


def test_every_cache_of_a_long_stream_keeps_its_own_lengths() -> None:
    """More steps than share an allocation."""
    caches = decode(KVCache.allocate(1, 1, 256, 16, torch.float32, DEVICE), 2 * length_rows.COUNT + 10)

    lengths = [cache.seq_lens for cache in caches]
    assert [lens.tolist() for lens in lengths] == [[n + 1] for n in range(len(caches))]
    assert len({lens.untyped_storage().data_ptr() for lens in lengths}) < 8
    lengths[70].zero_()
    assert [lens.tolist() for lens in lengths[69:72]] == [[70], [0], [72]]
    assert caches[70].seq_lens is lengths[70]


def test_lengths_written_on_one_stream_lie_in_memory_of_that_stream() -> None:
    caches = decode(KVCache.allocate(1, 1, 256, 16, torch.float32, DEVICE), 3)
    ((_, again),) = caches[-1]._lineage.relaunches
    streams = itertools.cycle([1, 2, 2])
    cast(Any, again.launch).current_stream = lambda: next(streams)

    caches = decode(caches[-1], 6)

    assert [cache._rows.stream for cache in caches] == [1, 2, 2, 1, 2, 2]
    assert [cache.seq_lens.tolist() for cache in caches] == [[4], [5], [6], [7], [8], [9]]


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_rows_are_aligned_and_lie_apart(batch: int) -> None:
    rows = length_rows.LengthRows(batch, DEVICE, None)
    addresses = list(rows.addresses)
    tensors = [rows.tensor(address) for address in addresses]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)

    assert len(addresses) == length_rows.COUNT
    assert [t.data_ptr() for t in tensors] == addresses
    assert all(address % 16 == 0 for address in addresses)
    assert [t.tolist() for t in tensors] == [[n] * batch for n in range(len(tensors))]


def test_a_long_generation_holds_no_more_memory_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where steps go to a kernel whose programs take several splits."""
    monkeypatch.setattr(tuning, "gpu", lambda _: tuning.Gpu(3, 0.0))
    live: list[weakref.ref[Tensor]] = []
    empty = buffers.empty

    def counted(*arguments: Any) -> Tensor:
        made = empty(*arguments)
        live.append(weakref.ref(made))
        return made

    monkeypatch.setattr(buffers, "empty", counted)
    held = []
    with tuning.forced(kv_split_size=16, block_n=16):
        cache = KVCache.allocate(1, 1, 256, 16, torch.float32, DEVICE)
        for step in range(256):
            (cache,) = decode(cache, 1)
            if step % 16 == 15:
                gc.collect()
                held.append(sum(tensor.nbytes for tensor in (ref() for ref in live) if tensor is not None))

    assert len(cache._lineage.relaunches) == 2
    assert len(cache._lineage.scratch) == 1
    assert max(held[10:]) == max(held[5:10])
