"""The small Triton kernels of the probe: one operation each, on what is loaded, stored as it comes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, c_ptr, ROWS: tl.constexpr, TERMS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [ROWS, COLUMNS] = dot(a [ROWS, TERMS], b [TERMS, COLUMNS], c), IEEE products for float32."""
    row = tl.arange(0, ROWS)[:, None]
    term = tl.arange(0, TERMS)
    column = tl.arange(0, COLUMNS)[None, :]
    a = tl.load(a_ptr + row * TERMS + term[None, :])
    b = tl.load(b_ptr + term[:, None] * COLUMNS + column)
    c = tl.load(c_ptr + row * COLUMNS + column)
    tl.store(out_ptr + row * COLUMNS + column, tl.dot(a, b, c, input_precision="ieee"))


@triton.jit
def exp2_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):
    """out = exp2(x)."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < count, other=0.0)
    tl.store(out_ptr + offset, tl.exp2(x), mask=offset < count)


@triton.jit
def log2_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):
    """out = log2(x)."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < count, other=1.0)
    tl.store(out_ptr + offset, tl.log2(x), mask=offset < count)


@triton.jit
def divide_kernel(out_ptr, x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """out = x / y."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < count, other=1.0)
    y = tl.load(y_ptr + offset, mask=offset < count, other=1.0)
    tl.store(out_ptr + offset, x / y, mask=offset < count)


@triton.jit
def multiply_subtract_kernel(out_ptr, x_ptr, y_ptr, z_ptr, count, BLOCK: tl.constexpr):
    """out = x * y - z, which a compiler may contract to one rounding."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < count, other=0.0)
    y = tl.load(y_ptr + offset, mask=offset < count, other=0.0)
    z = tl.load(z_ptr + offset, mask=offset < count, other=0.0)
    tl.store(out_ptr + offset, x * y - z, mask=offset < count)


@triton.jit
def cast_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):
    """out = x, in the type of out's elements."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < count, other=0.0)
    tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=offset < count)
