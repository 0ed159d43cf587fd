"""Tensors inside guard regions: every byte around and between their elements is known, before and after a call.

Three patterns tell where a stray NaN came from; each is a NaN in float16, bfloat16 and float32, so that a kernel
that reads one shows it in its output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

BitsArray = NDArray[Any]  # uint16 or uint32: raw bit patterns
Role = Literal["guard", "unused", "fresh"]

GUARD_ELEMENTS = 2048

_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_INT_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# guard: around and between elements; unused: what the contract says is not read; fresh: allocated, not yet written.
_PATTERNS: dict[str, dict[str, int]] = {
    "float16": {"guard": 0xFFFF, "unused": 0x7E55, "fresh": 0x7E2A},
    "bfloat16": {"guard": 0xFFFF, "unused": 0x7FD5, "fresh": 0x7FEA},
    "float32": {"guard": 0xFFFFFFFF, "unused": 0x7FC00055, "fresh": 0x7FC0002A},
}


def torch_dtype(fmt: str) -> torch.dtype:
    """The torch dtype of a format's name."""
    return _TORCH_DTYPES[fmt]


def poison(fmt: str, role: Role) -> int:
    """The bit pattern that fills ``role`` in tensors of format ``fmt``: a NaN whose payload names the role."""
    return _PATTERNS[fmt][role]


def bits_of(tensor: torch.Tensor) -> BitsArray:
    """The bit patterns of a tensor, on the host. No copy for a CPU tensor; strides are kept."""
    as_ints = tensor.detach().view(_INT_DTYPES[tensor.element_size()])
    array = as_ints.cpu().numpy()
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def tensor_of(bits: BitsArray, dtype: torch.dtype, device: str) -> torch.Tensor:
    """The tensor with these bit patterns. No copy on the CPU."""
    signed = bits.view(np.dtype(f"i{bits.dtype.itemsize}"))
    return torch.from_numpy(signed).to(device).view(dtype)


@dataclass(eq=False)
class Guarded:
    """A strided tensor inside a flat buffer that it does not fill.

    Attributes:
        name: what a failure calls it.
        tensor: the view that the kernel gets.
        storage: the whole buffer as integers of the element's size, on the device.
        guard: elements before the tensor's first one and after its last one.
    """

    name: str
    tensor: torch.Tensor
    storage: torch.Tensor
    guard: int = GUARD_ELEMENTS

    @classmethod
    def allocate(
        cls,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: str | torch.device,
        *,
        strides: Sequence[int] | None = None,
        fill: int | None = None,
    ) -> Guarded:
        """Allocate a tensor inside guards.

        Args:
            name: what a failure calls it.
            shape: of the tensor.
            dtype: of the tensor.
            device: of the tensor.
            strides: in elements; default contiguous. 0 expands a dimension.
            fill: bit pattern of the elements; default the guard's own (the caller writes the elements).
        """
        shape = tuple(shape)
        strides = contiguous_strides(shape) if strides is None else tuple(strides)
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        span = 0 if 0 in shape else span
        ints = _INT_DTYPES[dtype.itemsize]
        storage = torch.full((span + 2 * GUARD_ELEMENTS,), -1, dtype=ints, device=device)
        tensor = storage.view(dtype).as_strided(shape, strides, GUARD_ELEMENTS)
        if fill is not None:
            bits = 8 * dtype.itemsize
            signed = fill - (1 << bits) if fill >= 1 << (bits - 1) else fill
            storage.as_strided(shape, strides, GUARD_ELEMENTS).fill_(signed)
        return cls(name, tensor, storage)

    @classmethod
    def holding(
        cls, name: str, bits: BitsArray, dtype: torch.dtype, device: str, strides: Sequence[int] | None = None
    ) -> Guarded:
        """Allocate a tensor inside guards that holds ``bits``."""
        guarded = cls.allocate(name, bits.shape, dtype, device, strides=strides)
        # The elements of an expanded dimension share one place: it is written once, from the first of them.
        once = bits[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in guarded.strides)]
        ints = tensor_of(np.ascontiguousarray(once), guarded.storage.dtype, device)
        guarded.storage.as_strided(tuple(ints.shape), guarded.strides, guarded.guard).copy_(ints)
        return guarded

    @classmethod
    def around(cls, name: str, tensor: torch.Tensor) -> Guarded:
        """Somebody else's tensor, without guards."""
        ints = tensor.detach().view(_INT_DTYPES[tensor.element_size()])
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = ints.as_strided((span if tensor.numel() else 0,), (1,))
        return cls(name, tensor, flat, guard=0)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the tensor in elements."""
        return tuple(self.tensor.stride())

    def snapshot(self) -> BitsArray:
        """A copy of the whole buffer, guards and gaps included."""
        return bits_of(self.storage).copy()

    def elements(self, flat: NDArray[Any]) -> NDArray[Any]:
        """The tensor's elements inside a snapshot, as a writable view."""
        size = flat.dtype.itemsize
        return np.lib.stride_tricks.as_strided(
            flat[self.guard :], shape=tuple(self.tensor.shape), strides=tuple(size * s for s in self.strides)
        )

    def broken_guard(self) -> str | None:
        """Where an element before or after the tensor was written, in words; None if nowhere."""
        if not self.guard:
            return None
        flat = bits_of(self.storage)
        pattern = flat.dtype.type(np.iinfo(flat.dtype).max)
        before, after = flat[: self.guard][::-1], flat[flat.size - self.guard :]
        for region, words in ((before, "before the first"), (after, "after the last")):
            wrong = np.flatnonzero(region != pattern)
            if wrong.size:
                return f"{self.name}: {wrong.size} elements outside it written, {int(wrong[0]) + 1} {words}"
        return None

    def difference(self, expected: BitsArray) -> str | None:
        """The first place where the buffer differs from a snapshot, in words; None if nowhere.

        An element of the tensor is named in preference to one of a gap or a guard.
        """
        flat = bits_of(self.storage)
        if np.array_equal(flat, expected):
            return None
        digits = 2 * flat.dtype.itemsize
        wrong = np.flatnonzero(flat != expected)
        inside = np.argwhere(self.elements(flat) != self.elements(expected))
        if len(inside):
            index = tuple(int(i) for i in inside[0])
            was, now = self.elements(expected)[index], self.elements(flat)[index]
            place = f"{self.name}{list(index)}"
        else:
            first = int(wrong[0])
            was, now = expected[first], flat[first]
            side = "before it" if first < self.guard else "after it"
            in_gap = self.guard <= first < flat.size - self.guard
            place = f"{self.name}: an element {'in a gap of it' if in_gap else side}"
        return f"{place} was 0x{int(was):0{digits}x}, is 0x{int(now):0{digits}x} ({wrong.size} elements differ)"


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(max(1, n) for n in shape[i + 1 :]) for i in range(len(shape)))
