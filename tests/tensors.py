"""Tensors for examples: the device in use, reproducible values, and every byte behind a set of arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flashcore import KVCache
from flashcore.fast import interpreter

DEVICE = torch.device("cpu") if interpreter.is_on() else torch.device("cuda", 0)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def lengths(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A [batch] tensor of lengths."""
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def storage_bytes(tensor: Tensor) -> bytes:
    """Every byte of the memory behind a tensor, gaps of its strides included."""
    everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return everything.cpu().numpy().tobytes()


def memory(arguments: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes behind every tensor among the arguments, also those inside a cache."""
    found: dict[str, bytes] = {}
    for name, value in arguments.items():
        for path, tensor in _tensors(name, value):
            if tensor.layout == torch.strided and not tensor.is_meta:
                found[path] = storage_bytes(tensor)
    return found


def _tensors(name: str, value: Any) -> Iterable[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    if isinstance(value, (tuple, list)):
        for i, element in enumerate(value):
            yield from _tensors(f"{name}[{i}]", element)
    if isinstance(value, KVCache):
        yield from _tensors(f"{name}.seq_lens", value.seq_lens)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bit patterns; unlike ``torch.equal``, NaN equals itself and -0.0 is not 0.0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )
