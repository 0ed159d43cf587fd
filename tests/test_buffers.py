"""What the allocator hands out."""

from __future__ import annotations

import pytest
import torch

from flashcore.fast import buffers
from tests.tensors import DEVICE


@pytest.mark.parametrize("shape", [(2, 3, 1, 5), (1, 1, 4, 1), (1, 1, 1), (1,), [7], (2, 0, 3), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32])
def test_tensors_are_contiguous_and_share_no_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [buffers.empty(shape, dtype, DEVICE) for _ in range(2)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)

    for number, tensor in enumerate(tensors):
        assert (tensor.shape, tensor.dtype, tensor.device) == (torch.Size(shape), dtype, DEVICE)
        assert tensor.stride() == torch.empty(shape).stride()
        assert (tensor == number).all()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize
