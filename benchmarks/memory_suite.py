"""Memory over a long generation: nothing may grow that is not the cache, and a growing cache must grow rarely."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.contest import Bench
from benchmarks.host_suite import Decoding
from benchmarks.report import Row
from benchmarks.shapes import Shape

STEPS, QUICK_STEPS, INTERPRETED_STEPS = 10_000, 1_000, 40
LONG = Shape(4, 8, 8, 64, 1)
TINY = Shape(1, 1, 1, 16, 1)
FIRST_CAPACITY = 16


def run(bench: Bench) -> None:
    """A cache that is large enough from the start, then one that grows from a few slots."""
    steps = (QUICK_STEPS if bench.quick else STEPS) if bench.on_gpu else INTERPRETED_STEPS
    shape = LONG if bench.on_gpu else TINY
    bench.cell("memory", f"{steps} steps in a cache of that many slots", lambda: steady(bench, shape, steps))
    bench.cell("memory", f"{steps} steps from {FIRST_CAPACITY} slots", lambda: growing(bench, shape, steps))


def _allocated(bench: Bench) -> int:
    return int(torch.cuda.memory_allocated()) if bench.on_gpu else 0


def steady(bench: Bench, shape: Shape, steps: int) -> Row:
    """Allocated bytes at the first step, a tenth of the way, and at the end; the peak above what the caller holds.

    The workspace of the splits is there from the first step that splits; growth is counted from a tenth of the way.
    """
    loop = Decoding(shape, bench.device, steps)
    cache_bytes = sum(buffer.nbytes for buffer in loop.start)
    bench.synchronise()
    held = _allocated(bench)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    marks: dict[int, int] = {}
    began = time.perf_counter()
    out: Any = None
    for i in range(1, steps + 1):
        out = loop.step()
        if i in (1, steps // 10, steps):
            marks[i] = _allocated(bench)
    bench.synchronise()
    us = (time.perf_counter() - began) / steps * 1e6
    loop.cache.check()
    first, tenth, last = marks[1], marks[steps // 10], marks[steps]
    notes: dict[str, Any] = {
        "cache_bytes": cache_bytes,
        "allocated": {"before": held, "after step 1": first, f"after step {steps // 10}": tenth, "at the end": last},
        "final_length": int(loop.cache.seq_lens.max()),
    }
    if bench.on_gpu:
        peak = int(torch.cuda.max_memory_allocated()) - held
        notes |= {
            "growth": last - tenth,
            "peak_above_caches": peak,
            "workspace": (peak - 2 * (out.nbytes + loop.cache.seq_lens.nbytes)) / cache_bytes,
            "remark": f"grew {last - tenth} B since step {steps // 10} and {last - first} B since the first; "
            f"peak {peak} B above {cache_bytes} B of cache",
        }
    else:
        notes["remark"] = "allocated bytes are known on a GPU only"
    return Row("memory", f"{steps} steps in a cache of that many slots", us, 0, None, {},
               shape=shape.record(), notes=notes)  # fmt: skip


def growing(bench: Bench, shape: Shape, steps: int) -> Row:
    """Start from a few slots and let the cache grow up to the limit, as a list does."""
    loop = Decoding(shape, bench.device, FIRST_CAPACITY - shape.kv_len)
    loop.capacity = steps + shape.kv_len  # the limit it may grow to
    capacities = [loop.start.capacity]
    copied = 0
    bench.synchronise()
    held = _allocated(bench)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        before = loop.cache
        loop.step()
        if loop.cache.capacity != capacities[-1]:
            copied += sum(buffer.nbytes for buffer in before)
            capacities.append(loop.cache.capacity)
        del before
    bench.synchronise()
    us = (time.perf_counter() - began) / steps * 1e6
    loop.cache.check()
    final_bytes = sum(buffer.nbytes for buffer in loop.cache)
    notes: dict[str, Any] = {
        "capacities": capacities,
        "copied_bytes": copied,
        "copied_over_final": copied / final_bytes,
        "final_length": int(loop.cache.seq_lens.max()),
        "remark": f"grew {len(capacities) - 1} times to {capacities[-1]} slots, "
        f"copied {copied / final_bytes:.2f} times the final cache",
    }
    if bench.on_gpu:
        peak = int(torch.cuda.max_memory_allocated()) - held
        notes["peak_over_final"] = peak / final_bytes
        notes["remark"] += f", peak {peak / final_bytes:.2f} times it"
    return Row("memory", f"{steps} steps from {FIRST_CAPACITY} slots", us, 0, None, {},
               shape=shape.record(), notes=notes)  # fmt: skip
