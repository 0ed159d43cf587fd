"""Measure exp2, log2, division, casts and underflow of the device through the probe's kernels.

On a GPU exp2 and log2 are taken at every float32 of their range, in chunks; in the interpreter at a sample.
References are float64 functions of the device, whose own error (1e-16) is nothing beside float32's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from properties.probing import kernels
from references.rounding import encode

Tensor = torch.Tensor

CHUNK = 1 << 26
SAMPLE = 1 << 18
BLOCK = 1024
SMALLEST_NORMAL = 2.0**-126


@dataclass(frozen=True)
class Elementary:
    """Errors measured, each with how many arguments it was taken over.

    Attributes:
        exp2_error: largest relative error of exp2 on [-150, 1] where the result is normal.
        exp2_count: arguments.
        exp2_flushes: subnormal results are zero.
        exp2_exact: exp2(-k) == 2**-k for k = 0..126.
        log2_error: largest error of log2 on [0.5, 2**26], relative to 1 + abs(log2).
        log2_count: arguments.
        log2_exact: log2(2**k) == k for k = -1..26.
        division_error: largest relative error of a quotient.
        division_count: quotients.
        division_correctly_rounded: share of the quotients.
        division_exact: quotients that are float32 numbers come out exact.
        division_exact_by_powers: at least where the divisor is a power of two.
        flushes: a product below the smallest normal number is zero.
        contracts: x * y - z has one rounding.
        casts: rounding of float32 -> 16 bits, by format.
    """

    exp2_error: float
    exp2_count: int
    exp2_flushes: bool
    exp2_exact: bool
    log2_error: float
    log2_count: int
    log2_exact: bool
    division_error: float
    division_count: int
    division_correctly_rounded: float
    division_exact: bool
    division_exact_by_powers: bool
    flushes: bool
    contracts: bool
    casts: dict[str, str]


def measure(device: str) -> Elementary:
    """Run all measurements on "cuda" or, in the interpreter, on "cpu"."""
    exp2_error, exp2_count = _largest_error(
        kernels.exp2_kernel,
        torch.exp2,
        _ranges(device, (-150.0, -0.0), (0.0, 1.0)),
        device,
        relative_to_log=False,
    )
    log2_error, log2_count = _largest_error(
        kernels.log2_kernel, torch.log2, _ranges(device, (0.5, 2.0**26)), device, relative_to_log=True
    )
    division_error, division_count, correctly_rounded = _division(device)
    k = torch.arange(0, 127, dtype=torch.float32, device=device)
    logs = torch.arange(-1, 27, device=device).float()
    powers = torch.tensor([2.0**k for k in range(-1, 27)], dtype=torch.float32, device=device)
    weights = torch.tensor([2.0**-k for k in range(127)], dtype=torch.float32, device=device)
    tiny = torch.arange(-140, -127, dtype=torch.float32, device=device)
    smallest = torch.full((16,), SMALLEST_NORMAL, device=device)
    step = 2.0**-12
    near_one = torch.full((16,), 1 + step, device=device)
    contracted = launch(
        kernels.multiply_subtract_kernel, near_one, near_one, torch.full((16,), 1 + 2 * step, device=device)
    )
    return Elementary(
        exp2_error=exp2_error,
        exp2_count=exp2_count,
        exp2_flushes=bool((launch(kernels.exp2_kernel, tiny) == 0).any()),
        exp2_exact=bool((launch(kernels.exp2_kernel, -k) == weights).all()),
        log2_error=log2_error,
        log2_count=log2_count,
        log2_exact=bool((launch(kernels.log2_kernel, powers) == logs).all()),
        division_error=division_error,
        division_count=division_count,
        division_correctly_rounded=correctly_rounded,
        division_exact=_division_is_exact(device),
        division_exact_by_powers=_division_by_powers_is_exact(device),
        flushes=bool((launch(kernels.multiply_subtract_kernel, smallest, smallest * 0 + 0.5, smallest * 0) == 0).any()),
        contracts=bool((contracted != 0).any()),
        casts={name: _cast(device, name) for name in ("float16", "bfloat16")},
    )


def launch(kernel: Any, *operands: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An elementwise kernel on operands of one length."""
    count = operands[0].numel()
    out = torch.empty(count, dtype=dtype, device=operands[0].device)
    kernel[(-(-count // BLOCK),)](out, *operands, count, BLOCK=BLOCK)
    return out


def _ranges(device: str, *ends: tuple[float, float]) -> Iterator[Tensor]:
    """Every float32 between the ends of each range (of one sign), or a sample of them on the CPU."""
    for low, high in ends:
        first, last = sorted(int(np.float32(x).view(np.uint32)) for x in (low, high))
        if device == "cpu":
            drawn = np.random.default_rng(first).integers(first, last + 1, SAMPLE).astype(np.uint32)
            yield torch.from_numpy(drawn.view(np.float32))
            continue
        for start in range(first, last + 1, CHUNK):
            bits = torch.arange(start, min(start + CHUNK, last + 1), dtype=torch.int64, device=device)
            yield torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _largest_error(
    kernel: Any,
    exact: Callable[[Tensor], Tensor],
    arguments: Iterator[Tensor],
    device: str,
    *,
    relative_to_log: bool,
) -> tuple[float, int]:
    """Largest error over all arguments: relative, or relative to 1 + |value|; subnormal results left out."""
    largest, count = 0.0, 0
    for x in arguments:
        value = exact(x.to(device).double())
        error = (launch(kernel, x.to(device)).double() - value).abs()
        ratio = error / (1 + value.abs()) if relative_to_log else error / value
        normal = value.abs() >= SMALLEST_NORMAL
        considered = torch.where(normal | relative_to_log, ratio, torch.zeros_like(ratio))
        largest = max(largest, float(considered.max()))
        count += int(x.numel()) if relative_to_log else int(normal.sum())
    return largest, count


def _division(device: str) -> tuple[float, int, float]:
    """Every significand of the divisor (a sample on the CPU) under numerators of random significand."""
    rng = np.random.default_rng(7)
    divisors = torch.arange(1 << 23, 1 << 24, device=device).float()
    numerators = rng.integers(1 << 23, 1 << 24, 64)
    if device == "cpu":
        divisors = divisors[torch.from_numpy(rng.integers(0, 1 << 23, SAMPLE // 8))]
        numerators = numerators[:8]
    largest, count, right = 0.0, 0, 0
    for numerator in numerators:
        x = torch.full_like(divisors, float(numerator))
        quotient = launch(kernels.divide_kernel, x, divisors)
        # The float64 quotient of two float32 rounds to the correctly rounded float32 quotient.
        exact = x.double() / divisors.double()
        largest = max(largest, float(((quotient.double() - exact) / exact).abs().max()))
        right += int((quotient == exact.float()).sum())
        count += quotient.numel()
    return largest, count, right / count


def _division_is_exact(device: str) -> bool:
    """Whether i * j / j == i for all 12-bit i, j (8 bits on the CPU)."""
    small = torch.arange(1, 1 << (12 if device != "cpu" else 8), device=device)
    i, j = (x.reshape(-1) for x in torch.meshgrid(small, small, indexing="ij"))
    return bool((launch(kernels.divide_kernel, (i * j).float(), j.float()) == i.float()).all())


def _division_by_powers_is_exact(device: str) -> bool:
    """Whether 24-bit integers over 2**0 .. 2**24 come out exact."""
    drawn = np.random.default_rng(3).integers(1, 1 << 24, 4096)
    numerators = torch.from_numpy(drawn).to(device).double()
    powers = torch.tensor([2.0**k for k in range(25)], dtype=torch.float64, device=device)
    x = numerators.repeat_interleave(len(powers))
    y = powers.repeat(len(numerators))
    return bool((launch(kernels.divide_kernel, x.float(), y.float()).double() == x / y).all())


def _cast(device: str, fmt: str) -> str:
    """How float32 is rounded to a 16-bit format: every upper half with lower halves around the midpoint."""
    low = np.array([0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | low).reshape(-1)
    values = bits.view(np.float32)
    normal = np.isfinite(values) & ((np.abs(values) >= SMALLEST_NORMAL) | (values == 0))
    values = values[normal]
    dtype = getattr(torch, fmt)
    stored = launch(kernels.cast_kernel, torch.from_numpy(values).to(device), dtype=dtype)
    got = stored.view(torch.int16).cpu().numpy().view(np.uint16)
    if np.array_equal(got, encode(values.astype(np.float64), fmt)):
        return "nearest even"
    if np.array_equal(got, encode(values.astype(np.float64), fmt, "toward_zero")):
        return "toward zero"
    return "neither nearest even nor toward zero"
