"""Memory for the lengths that decode steps return: one allocation for many steps, tensors only for who asks."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.fast import buffers

COUNT = 64
"""Steps that share an allocation."""

ALIGNMENT = 4
"""A row begins at a multiple of so many int32, as an allocation of its own would for the kernel."""


class LengthRows:
    """Rows of [batch] int32, each handed out once.

    Attributes:
        addresses: of the rows that nobody has.
        stream: on which they are used, and their memory used again.
    """

    def __init__(self, batch: int, device: torch.device, stream: int | None) -> None:
        """Allocate them."""
        self.batch = batch
        self.stream = stream
        self.block = buffers.empty((COUNT, -(-batch // ALIGNMENT) * ALIGNMENT), torch.int32, device)
        self.first, self.row_bytes = self.block.data_ptr(), self.block.stride(0) * self.block.itemsize
        self.addresses = iter(range(self.first, self.first + COUNT * self.row_bytes, self.row_bytes))

    def tensor(self, address: int) -> Tensor:
        """[batch] int32, the row at ``address``."""
        return self.block[(address - self.first) // self.row_bytes, : self.batch]
