"""The two ceilings, measured in the same run as everything that is compared with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.timing import Call, time_interpreted, time_on_gpu


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached just now.

    Attributes:
        copy_tb_s: device-to-device copy, bytes read plus bytes written; by a copy or a kernel that negates, the faster.
        read_tb_s: a sum over a large tensor, bytes read.
        matmul_tflops: the product of two bfloat16 matrices of 8192 x 8192 random numbers.
    """

    copy_tb_s: float
    read_tb_s: float
    matmul_tflops: float


def measure(device: str) -> Ceilings:
    """Measure them: on a GPU with graph replay; on a CPU with sizes that take no time, for form's sake."""
    on_gpu = device == "cuda"
    elements, order = (1 << 29, 8192) if on_gpu else (1 << 20, 128)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # Zeros would run faster than data does.
    numbers = torch.randn(elements, device=device)
    copy = torch.empty_like(numbers)
    # In a graph, a copy is a node of another kind than a kernel, and on an H100 a fifth slower.
    copy_us = min(_us(lambda: copy.copy_(numbers), on_gpu), _us(lambda: torch.neg(numbers, out=copy), on_gpu))
    read_us = _us(numbers.sum, on_gpu)
    a, b = (torch.randn(order, order, device=device, dtype=dtype) for _ in range(2))
    matmul_us = _us(lambda: a @ b, on_gpu)
    return Ceilings(
        copy_tb_s=2 * 4 * elements / copy_us / 1e6,
        read_tb_s=4 * elements / read_us / 1e6,
        matmul_tflops=2 * order**3 / matmul_us / 1e6,
    )


def _us(call: Call, on_gpu: bool) -> float:
    # Several in a graph: the pause between two replays is not the operation's.
    timing, _ = time_on_gpu([call] * 4, seconds=0.15) if on_gpu else time_interpreted([call])
    return timing.us
