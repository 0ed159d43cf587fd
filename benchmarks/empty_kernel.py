"""A kernel that does nothing, to see what launching costs."""

import triton


@triton.jit
def empty_kernel(pointer):
    """Do nothing."""
