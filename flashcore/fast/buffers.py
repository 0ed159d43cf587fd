"""The one allocator of everything flashcore writes: outputs, LSE, scratch and cache buffers.

Every caller says ``buffers.empty(...)``, so that a test suite can put its own allocator here: one that
fills memory with NaN and surrounds it with guard bytes shows a read of unwritten memory or a store out
of bounds, which a plain ``torch.empty`` hides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate an uninitialised contiguous tensor."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


@functools.cache
def unused(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What stands where a kernel takes a pointer that this call never follows; one element, never read or written."""
    return torch.empty(1, dtype=dtype, device=device)
