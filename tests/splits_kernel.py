"""What the device makes of rows of some lengths, as a kernel of its own."""

import triton
import triton.language as tl

from flashcore.fast.kernels.primitives import row_splits


@triton.jit
def splits_of_rows(
    lengths_ptr, out_ptr, unsplit_size, kv_split_size, few_splits, max_splits, count,
    LONG: tl.constexpr, LONGEST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[i] = the number of splits of a row of lengths[i] slots, and the slots of each; [count, 2] int32."""
    for i in range(count):
        num_splits, size = row_splits(
            tl.load(lengths_ptr + i), unsplit_size, kv_split_size, few_splits, max_splits, LONG, LONGEST, BLOCK_N
        )
        tl.store(out_ptr + 2 * i, num_splits)
        tl.store(out_ptr + 2 * i + 1, size)
