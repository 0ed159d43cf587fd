"""The one allocator of everything flashcore writes: outputs, LSE, scratch and cache buffers.

Every caller says ``buffers.empty(...)``, so that a test suite can put its own allocator here: one that
fills memory with NaN and surrounds it with guard bytes shows a read of unwritten memory or a store out
of bounds, which a plain ``torch.empty`` hides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate an uninitialised contiguous tensor.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        device: a tensor's own: with its index, which the current device must not decide.
    """
    # Half of the time of torch.empty goes into parsing its arguments.
    return torch.empty_like(_model(tuple(shape), dtype, device))


@functools.lru_cache(maxsize=256)
def _model(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of that shape that holds one element, or none."""
    if math.prod(shape) < 2:  # the strides of such a tensor would be copied
        return torch.empty(shape, dtype=dtype, device=device)
    return unused(dtype, device).expand(shape)


@functools.cache
def unused(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What stands where a kernel takes a pointer that this call never follows; one element, never read or written."""
    return torch.empty(1, dtype=dtype, device=device)
