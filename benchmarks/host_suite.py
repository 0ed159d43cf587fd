"""Host time of a decode step as a user pays it: eager calls on a ``KVCache``, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import flashcore
from benchmarks.contest import Bench, first_line
from benchmarks.empty_kernel import empty_kernel
from benchmarks.report import Row
from benchmarks.shapes import Shape
from benchmarks.timing import Timing, time_on_host

ONE_SPLIT = Shape(1, 8, 8, 64, 128)
SEVERAL_SPLITS = Shape(1, 32, 8, 128, 2048, "bfloat16")
TINY = Shape(1, 2, 1, 16, 32)
CALLS = 200
"""In a sample: fewer launches than a stream's queue holds (about a thousand), or the host would wait for the device."""


def run(bench: Bench) -> None:
    """Both ways through the kernel, and PyTorch beside them."""
    for shape in (ONE_SPLIT, SEVERAL_SPLITS) if bench.on_gpu else (TINY,):
        bench.cell("host", shape.name, partial(row_of, bench, shape))


class Decoding:
    """A user's decode loop.

    Args:
        shape: kv_len is the length it starts from.
        device: where.
        steps: room for this many.
        rewinding: whether to start again when they are used up, instead of asking for more room.
    """

    def __init__(self, shape: Shape, device: str, steps: int, rewinding: bool = False) -> None:
        dtype = getattr(torch, shape.dtype)
        self.steps = steps if rewinding else None
        self.capacity = shape.kv_len + steps
        self.q = torch.randn(shape.batch, shape.num_q_heads, 1, shape.head_dim, device=device, dtype=dtype)
        self.k = torch.randn(shape.batch, shape.num_kv_heads, 1, shape.head_dim, device=device, dtype=dtype)
        self.v = torch.randn_like(self.k)
        self.start = flashcore.KVCache.allocate(
            shape.batch, shape.num_kv_heads, self.capacity, shape.head_dim, dtype, device
        )
        for buffer in self.start:
            buffer.normal_()
        lens = torch.full((shape.batch,), shape.kv_len, dtype=torch.int32, device=device)
        self.start = flashcore.KVCache(*self.start, lens, max_len=shape.kv_len, min_len=shape.kv_len, like=self.start)
        self.rewind()

    def rewind(self) -> None:
        """Start again."""
        self.cache: Any = self.start
        self.done = 0

    def step(self) -> Any:
        """One token."""
        if self.done == self.steps:
            self.rewind()
        self.done += 1
        result = flashcore.attention_with_kv_cache(self.q, self.k, self.v, self.cache, cache_max_len=self.capacity)
        self.cache = result[1]
        return result[0]


def row_of(bench: Bench, shape: Shape) -> Row:
    """Microseconds from call to call, the device left to catch up between samples."""
    calls, samples = (CALLS, 15) if bench.on_gpu else (2, 2)
    # Few enough steps to stay within the number of splits that the shape starts with.
    loop = Decoding(shape, bench.device, steps=256, rewinding=True)

    def time(call: Callable[[], Any]) -> Timing:
        return time_on_host(
            call, warmup=8, samples=samples, synchronise=bench.synchronise, calls=calls, wait_inside=False
        )

    timing = time(loop.step)
    notes: dict[str, Any] = {"calls_per_second": 1e6 / timing.us, "us_target": 12.0}
    notes["synchronisations"] = synchronisations(bench, loop)
    notes["remark"] = f"{1e6 / timing.us:.0f} calls/s, {notes['synchronisations']}"
    row = Row("host", shape.name, timing.us, 0, None, {}, spread=timing.spread, shape=shape.record(), notes=notes)

    key, value = (buffer[:, :, : shape.kv_len] for buffer in loop.start)
    grouped = shape.num_q_heads != shape.num_kv_heads
    others: dict[str, Callable[[], Any]] = {
        "SDPA": lambda: F.scaled_dot_product_attention(loop.q, key, value, enable_gqa=grouped),
        "bare Triton launch": lambda: empty_kernel[(1,)](loop.q),
        "torch.empty": lambda: torch.empty_like(loop.q),
    }
    for name, call in others.items():
        try:
            row.peers[name] = time(call).us
        except Exception as error:  # a peer that fails has no time
            row.refused[name] = first_line(error)
    return row


@contextmanager
def synchronising_forbidden() -> Iterator[None]:
    """PyTorch raises on whatever waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def synchronisations(bench: Bench, loop: Decoding) -> str:
    """Whether a step waits for the device: shown twice, eagerly with waiting forbidden, and inside a graph capture."""
    if not bench.on_gpu:
        return "synchronisations: nothing to wait for without a GPU"
    loop.rewind()
    try:
        with synchronising_forbidden():
            for _ in range(16):
                loop.step()
    except Exception as error:  # the error of the debug mode is a plain RuntimeError
        return f"SYNCHRONISES in eager steps: {first_line(error)}"
    bench.synchronise()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(4):
                loop.step()
        graph.replay()
        bench.synchronise()
        loop.cache.check()
    except Exception as error:
        return f"SYNCHRONISES in a graph capture: {first_line(error)}"
    finally:
        loop.rewind()
    return "0 synchronisations (eager with waiting forbidden, and captured)"
