"""How tensors lie in memory, as data: what a layout's name means, for whoever allocates.

A tensor is always [batch, heads, tokens, head_dim] to the caller; a layout says how it is cut out of a larger
contiguous buffer. Nothing outside the tensor may be read or written, so everything else in the buffer is a gap.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A view of a contiguous buffer.

    Attributes:
        memory_order: axes of the tensor from the slowest to the fastest in memory.
        spacing: the buffer holds this many times more along each axis of the tensor (plus one, so that the
            view's strides are no multiple of anything); the tensor is every spacing-th element, from 0.
        shares_heads: all heads are the same memory (stride 0); the tensor must not be written.
    """

    memory_order: tuple[int, int, int, int] = (0, 1, 2, 3)
    spacing: tuple[int, int, int, int] = (1, 1, 1, 1)
    shares_heads: bool = False

    @property
    def has_gaps(self) -> bool:
        """Whether the buffer holds more than the tensor."""
        return max(self.spacing) > 1

    def buffer_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        """Shape of the contiguous buffer, axes in memory order, for a tensor of that shape."""
        extents = [size * step + (step > 1) for size, step in zip(shape, self.spacing, strict=True)]
        if self.shares_heads:
            extents[1] = 1
        return tuple(extents[axis] for axis in self.memory_order)

    def strides(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Strides of the tensor in elements, its first element being the buffer's first."""
        steps = [0, 0, 0, 0]
        extent = 1
        for axis, size in zip(reversed(self.memory_order), reversed(self.buffer_shape(shape)), strict=True):
            steps[axis] = extent * self.spacing[axis]
            extent *= size
        if self.shares_heads:
            steps[1] = 0
        return (steps[0], steps[1], steps[2], steps[3])


LAYOUT_OF = {
    "contiguous": Layout(),
    # As a projection leaves it: [batch, tokens, heads, head_dim].
    "transposed": Layout(memory_order=(0, 2, 1, 3)),
    # Every second element along every axis, head_dim included.
    "gapped": Layout(spacing=(2, 2, 2, 2)),
    "expanded_heads": Layout(shares_heads=True),
}
