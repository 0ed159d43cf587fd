"""Ways to call a kernel that must not matter: each turns a subject into one that is called so."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from properties.case import Case, Row
from properties.subjects import Subject

Function = Callable[..., Any]

FAR_ELEMENTS = {"cpu": 2**36, "cuda": 2**32}  # of one tensor of `far_apart`, gaps included: they take memory on a GPU
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


def _wrapped(subject: Subject, wrap: Callable[[Function], Function]) -> Subject:
    return replace(
        subject,
        attention_with_kv_cache=wrap(subject.attention_with_kv_cache),
        attention=None if subject.attention is None else wrap(subject.attention),
        is_disturbed=True,
    )


def repeating(subject: Subject) -> Subject:
    """Every call is made twice on the same cache; the second one's results count (a retry)."""

    def wrap(function: Function) -> Function:
        def twice(*tensors: Any, **options: Any) -> Any:
            function(*tensors, **options)
            return function(*tensors, **options)

        return twice

    return _wrapped(subject, wrap)


def interleaved(subject: Subject) -> Subject:
    """Before every call others are made, with another head_dim, dtype, batch, scale and number of splits."""
    other = subject.attention_with_kv_cache
    rows = (Row(40, (2,)), Row(0, (2,)), Row(7, (2,)))
    like = Case(rows, num_kv_heads=2, group_size=3, scale=2.0, is_causal=True, start="tuple", capacity=64)
    for head_dim in (24, 64):
        subject.capabilities.require(replace(like, head_dim=head_dim))

    def disturb(device: torch.device, like: torch.dtype) -> None:
        for dtype, head_dim, cached in ((torch.float32, 24, 40), (like, 64, 3)):
            new = torch.full((3, 2, 2, head_dim), 3.0, dtype=dtype, device=device)
            buffers = tuple(torch.full((3, 2, 64, head_dim), 2.0, dtype=dtype, device=device) for _ in range(2))
            lens = torch.tensor([cached, 0, 7], dtype=torch.int64, device=device)
            other(new.repeat(1, 3, 1, 1), new, new, buffers, lens, scale=2.0, block_n=16, is_causal=True)

    def wrap(function: Function) -> Function:
        def disturbed(*tensors: Any, **options: Any) -> Any:
            disturb(tensors[0].device, tensors[0].dtype)
            return function(*tensors, **options)

        return disturbed

    return _wrapped(subject, wrap)


def _every_second(lengths: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same lengths as integers of another width, every second element of a larger tensor."""
    wide = torch.zeros(2 * len(lengths), dtype=dtype, device=lengths.device)
    wide[::2] = lengths
    return wide[::2]


def with_lengths_as(subject: Subject, dtype: torch.dtype) -> Subject:
    """Lengths are always passed, as integers of another width and every second element of a larger tensor."""

    def wrap(function: Function) -> Function:
        def converted(*tensors: Any, **options: Any) -> Any:
            past = options.get("past_key_value")
            if past is not None and hasattr(past, "seq_lens"):
                options.setdefault("seq_lens", past.seq_lens)
            for name in ("seq_lens", "new_lens"):
                if name in options:
                    options[name] = _every_second(options[name], dtype)
            return function(*tensors, **options)

        return converted

    return _wrapped(subject, wrap)


def with_lengths_held_as(subject: Subject, dtype: torch.dtype) -> Subject:
    """A cache that no call returned holds its lengths like that; those that calls return are passed on as they are."""
    returned: list[Any] = []

    def wrap(function: Function) -> Function:
        def held(*tensors: Any, **options: Any) -> Any:
            past: Any = options.get("past_key_value")
            if hasattr(past, "seq_lens") and not any(past is cache for cache in returned):
                assert subject.make_cache is not None
                options["past_key_value"] = subject.make_cache(*past, _every_second(past.seq_lens, dtype))
            result = function(*tensors, **options)
            returned.extend(part for part in result if hasattr(part, "seq_lens"))
            return result

        return held

    return _wrapped(subject, wrap)


def unaligned(subject: Subject) -> Subject:
    """Query, key and value start one element past an aligned address."""

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        view = room[1:].view(tensor.shape)
        return view.copy_(tensor)

    def wrap(function: Function) -> Function:
        return lambda *tensors, **options: function(*(shifted(tensor) for tensor in tensors), **options)

    return _wrapped(subject, wrap)


def _untouched(count: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for that many elements; on the CPU only the pages that are written take any."""
    if like.is_cuda:
        return torch.empty(count, dtype=like.dtype, device=like.device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, count * like.element_size(), flags=flags), dtype=like.dtype)


def far_apart(subject: Subject, axes: Sequence[int], what: str = "all", reach: int | None = None) -> Subject:
    """Offsets pass 2**31 elements: neighbours along some axes of every tensor lie far from each other.

    The caller's cache is left alone; the one returned lies in the large memory. On the CPU most of that is never
    touched and so costs nothing.

    Args:
        subject: the kernel.
        axes: 0 batch rows, those of the lengths too, 1 heads, 2 tokens.
        what: "all" tensors; or, where there is a cache, the "cache" or the "new" tokens alone.
        reach: that many places after the first one of an axis, offsets pass 2**31: none before does. A tensor that
            would get longer than ``FAR_ELEMENTS`` is spread less; None, and one that is shorter: at its last place.
    """

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return tensor
        strides = [0] * tensor.dim()
        size = 1
        for dim in range(tensor.dim() - 1, -1, -1):
            strides[dim] = size
            size = -(-size * tensor.shape[dim] // 8) * 8  # a multiple of 8 stays aligned
        for axis in axes:
            count = tensor.shape[axis] if axis < tensor.dim() else 1
            if count > 1:
                places = min(count - 1, max(reach or count, -(-count * 2**31 // FAR_ELEMENTS[tensor.device.type])))
                # Whole tensors further: no two elements coincide.
                strides[axis] += -(-(2**31) // (places * size)) * size
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
        return _untouched(span, tensor).as_strided(tensor.shape, strides).copy_(tensor)

    def wrap(function: Function) -> Function:
        def far(*tensors: Any, **options: Any) -> Any:
            past = options.get("past_key_value")
            if past is not None:
                options["past_key_value"] = tuple(buffer if what == "new" else spread(buffer) for buffer in past)
                options.setdefault("seq_lens", getattr(past, "seq_lens", None))
            for name in {"seq_lens", "new_lens"} & options.keys() if 0 in axes else ():
                options[name] = spread(options[name].int())
            if past is not None and what == "cache":
                return function(*tensors, **options)
            return function(*(spread(tensor) for tensor in tensors), **options)

        return far

    return _wrapped(subject, wrap)


@contextlib.contextmanager
def large_memory() -> Iterator[None]:
    """For the memory of a GPU that ``far_apart`` takes: one process at a time has it. Elsewhere it costs nothing."""
    if not torch.cuda.is_available():
        yield
        return
    with Path(tempfile.gettempdir(), "flashcore-large-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


def before_inaccessible_memory(subject: Subject) -> Subject:
    """Every tensor ends where memory begins that may not be read: whoever reads past its end dies of it.

    The caller's cache is left alone; the one returned lies in that memory. On a GPU, where compute-sanitizer
    watches, nothing is different.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda or not tensor.numel():
            return tensor
        return _ending_at_a_page(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)

    def wrap(function: Function) -> Function:
        def walled(*tensors: Any, **options: Any) -> Any:
            past = options.get("past_key_value")
            if past is not None:
                options["past_key_value"] = tuple(moved(buffer) for buffer in past)
                options.setdefault("seq_lens", getattr(past, "seq_lens", None))
            for name in ("seq_lens", "new_lens"):
                if name in options:
                    options[name] = moved(options[name])
            return function(*(moved(tensor) for tensor in tensors), **options)

        return walled

    return _wrapped(subject, wrap)


def _ending_at_a_page(count: int, dtype: torch.dtype) -> torch.Tensor:
    """That many elements of which the last one ends before a page that may be neither read nor written."""
    size = count * dtype.itemsize
    readable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, readable + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + readable
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0):  # PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=readable - size)


def on_a_side_stream(subject: Subject) -> Subject:
    """Every call on a stream of its own, which waits for the inputs and is waited for."""

    def wrap(function: Function) -> Function:
        def aside(*tensors: Any, **options: Any) -> Any:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function(*tensors, **options)
            torch.cuda.current_stream().wait_stream(stream)
            return result

        return aside

    return _wrapped(subject, wrap)


def beside_another_stream(subject: Subject) -> Subject:
    """While a call runs, read-only calls of the same shape on the same cache run on another stream."""

    def wrap(function: Function) -> Function:
        def crowded(*tensors: Any, **options: Any) -> Any:
            others = {**options, "update_cache": False} if "update_cache" in options else options
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    function(*tensors, **others)
            result = function(*tensors, **options)
            torch.cuda.current_stream().wait_stream(stream)
            return result

        return crowded

    return _wrapped(subject, wrap)


def on_device(subject: Subject, device: str) -> Subject:
    """The call's tensors on another device than the current one; its results brought back."""

    def wrap(function: Function) -> Function:
        def elsewhere(*tensors: Any, **options: Any) -> Any:
            home = tensors[0].device
            past = options.get("past_key_value")
            if past is not None:
                options.setdefault("seq_lens", getattr(past, "seq_lens", None))
                options["past_key_value"] = tuple(buffer.to(device) for buffer in past)
            for name in ("seq_lens", "new_lens"):
                if name in options:
                    options[name] = options[name].to(device)
            result = function(*(tensor.to(device) for tensor in tensors), **options)
            out, *cache, lse = result
            for kept in cache:
                if kept is not None:
                    lengths = kept.seq_lens.to(home)
                    assert subject.make_cache is not None
                    cache = [subject.make_cache(*(buffer.to(home) for buffer in kept), lengths)]
            return (out.to(home), *cache, lse.to(home))

        return elsewhere

    return _wrapped(subject, wrap)
