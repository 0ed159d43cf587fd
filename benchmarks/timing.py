"""Timing: CUDA-graph replay over rotating inputs on the device, and plain clocks on the host."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        us: median of the samples.
        low, high: quartiles.
        samples: how many.
    """

    us: float
    low: float
    high: float
    samples: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.us if self.us else 0.0


def summarise(samples: Sequence[float]) -> Timing:
    """Median and quartiles of at least one sample."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, len(samples))


def time_on_gpu(
    calls: Sequence[Call], *, seconds: float = 0.08, warmup: int | None = None, samples: int | None = None
) -> tuple[Timing, Tensor]:
    """Time one call on the GPU, as one of many in a CUDA graph that is replayed.

    The graph holds every call once, each on inputs of its own, so that with enough of them each finds its inputs
    evicted from the L2 cache, and the host's launches cost nothing.

    Args:
        calls: the same operation on different inputs; they must not synchronise.
        seconds: about how long to measure.
        warmup: replays before; default about 3 ms.
        samples: how many; default as many as the time allows, 5 to 25. A sample is at least a millisecond long.

    Returns:
        The timing, and a copy of what the last replay of the first call wrote.
    """
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever is done once a shape is done outside the graph
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = [call() for call in calls]
    replay_us = _elapsed(graph, [1])[0]
    for _ in range(math.ceil(3000 / max(replay_us, 1.0)) if warmup is None else warmup):
        graph.replay()
    replay_us = _elapsed(graph, [1])[0]
    replays = max(1, math.ceil(1000 / max(replay_us, 1.0)))
    if samples is None:
        samples = min(25, max(5, int(seconds * 1e6 / (replays * replay_us))))
    times = [us / replays / len(calls) for us in _elapsed(graph, [replays] * samples)]
    first = outputs[0].clone()
    torch.cuda.synchronize()
    del outputs
    graph.reset()
    return summarise(times), first


def _elapsed(graph: Any, replays: Sequence[int]) -> list[float]:
    """Microseconds of each group of replays. All are queued before the first is waited for: the GPU never idles."""
    events = []
    for count in replays:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def time_on_host(
    call: Callable[[], Any],
    *,
    warmup: int,
    samples: int,
    synchronise: Callable[[], None],
    calls: int = 1,
    wait_inside: bool = True,
) -> Timing:
    """Time calls with the host's clock.

    Args:
        call: what to time.
        warmup: calls before.
        samples: how many.
        synchronise: waits for the device.
        calls: in one sample; the sample is their mean.
        wait_inside: whether a sample ends when the device is done, or when the host has issued the calls.
    """
    for _ in range(warmup):
        call()
    times = []
    for _ in range(samples):
        synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if wait_inside:
            synchronise()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    synchronise()
    return summarise(times)


def time_interpreted(calls: Sequence[Call], *, samples: int = 3) -> tuple[Timing, Tensor]:
    """Time one call where there is no GPU. Says nothing about a GPU; it shows that the programs work."""
    out = calls[0]()
    times = []
    for i in range(samples):
        start = time.perf_counter()
        out = calls[i % len(calls)]()
        times.append((time.perf_counter() - start) * 1e6)
    return summarise(times), calls[0]() if samples % len(calls) else out
