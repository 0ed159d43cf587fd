"""What Triton's interpreter computes here, with or without flashcore's corrections, as one JSON object.

    TRITON_INTERPRET=1 python -m tests.interpreter_probe [corrected]

``tests/test_interpreter.py`` runs it, so that the answers are the same on a machine whose kernels run on a GPU.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as upstream

SIZE = 16


@triton.jit
def scaled(x, factor):
    """A nested jit function: each call makes the interpreter prepare the language."""
    return x * factor


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, SIZE: tl.constexpr):
    """out = a @ b, [SIZE, SIZE], accumulated in float32."""
    rows = tl.arange(0, SIZE)
    offsets = rows[:, None] * SIZE + rows[None, :]
    a = tl.load(a_ptr + offsets)
    b = tl.load(b_ptr + offsets)
    tl.store(out_ptr + offsets, scaled(tl.dot(a, b), 1.0))


@triton.jit
def cast_kernel(out_ptr, x_ptr, SIZE: tl.constexpr, STORE_CASTS: tl.constexpr):
    """Out = x in the dtype of out, by a cast or by the store."""
    offsets = tl.arange(0, SIZE)
    x = scaled(tl.load(x_ptr + offsets), 1.0) if out_ptr.dtype.element_ty != tl.float32 else tl.load(x_ptr + offsets)
    if STORE_CASTS:
        tl.store(out_ptr + offsets, x)
    else:
        tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty))


@triton.jit
def other_kernel(out_ptr, x_ptr, other_ptr):
    """Out = a masked load of one element: ``other``, which the interpreter asks for its truth."""
    other = tl.load(other_ptr)
    tl.store(out_ptr, tl.load(x_ptr, mask=tl.load(x_ptr) > 1.0, other=other))


@triton.jit
def failing_kernel(out_ptr, SIZE: tl.constexpr):
    """Raise after a nested call: SIZE is no power of two."""
    tl.store(out_ptr, scaled(1.0, 1.0))
    tl.arange(0, SIZE)


def language_state() -> dict[str, int]:
    """Every attribute of the language that a launch may replace, by the identity of its value."""
    places: dict[str, Any] = {
        "tl": tl,
        "core": tl.core,
        "tensor": tl.tensor,
        "math": tl.math,
        "descriptor": tl.core.tensor_descriptor_base,
    }
    return {
        f"{place}.{name}": id(inspect.getattr_static(owner, name))
        for place, owner in places.items()
        for name in dir(owner)
        if name != "__annotations__"  # comes into being when it is first looked at
    }


def dot_is_right(dtype: torch.dtype) -> bool:
    """Small integers are exact in every format, and so are their products and sums."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-8, 9, (2, SIZE, SIZE), generator=generator).to(dtype)
    out = torch.full((SIZE, SIZE), torch.nan)
    dot_kernel[(1,)](out, a, b, SIZE=SIZE)
    return torch.equal(out, a.float() @ b.float())


def narrows_to_nearest(store_casts: bool) -> bool:
    """Values a quarter, a half (to even: up and down) and three quarters between neighbours in bfloat16."""
    low = torch.tensor([1.0, 1 + 2**-7, 3.0, -1.0], dtype=torch.float32)
    spacing = torch.tensor([2**-7, 2**-7, 2**-6, -(2**-7)])
    x = torch.cat([low + spacing * part for part in (0.25, 0.5, 0.75, 0.0)])
    out = torch.full((len(x),), torch.nan, dtype=torch.bfloat16)
    cast_kernel[(1,)](out, x, SIZE=len(x), STORE_CASTS=store_casts)
    return torch.equal(out, x.to(torch.bfloat16))


def widens_exactly() -> bool:
    """A power-of-two number of bfloat16 values of every exponent."""
    x = torch.arange(0x0080, 0x7F80, dtype=torch.int32)[: 1 << 14].to(torch.int16).view(torch.bfloat16)
    out = torch.full((len(x),), torch.nan)
    cast_kernel[(1,)](out, x, SIZE=len(x), STORE_CASTS=False)
    return torch.equal(out, x.float())


def preparations(grid: int) -> int:
    """How often one launch of ``grid`` programs prepares the language."""
    count = 0
    original = upstream._patch_lang_tensor

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments)

    upstream._patch_lang_tensor = counting
    try:
        a = torch.zeros(SIZE, SIZE)
        dot_kernel[(grid,)](torch.zeros(SIZE, SIZE), a, a, SIZE=SIZE)
    finally:
        upstream._patch_lang_tensor = original
    return count


def others_are_loaded() -> bool:
    """Whether one kernel gives each of several ``other`` values, zero first."""
    given = [0.0, 5.0, 7.0]
    out = torch.full((len(given),), torch.nan)
    for i, other in enumerate(given):
        other_kernel[(1,)](out[i:], torch.ones(1), torch.tensor([other]))
    return out.tolist() == given


def raised_by_the_failing_kernel() -> bool:
    """Whether the kernel that must fail does."""
    try:
        failing_kernel[(1,)](torch.zeros(1), SIZE=3)
    except Exception:
        return True
    return False


def main(corrected: bool) -> None:
    """Print what was found."""
    if corrected:
        importlib.import_module("flashcore")
    before = language_state()
    with np.errstate(all="ignore"):
        found: dict[str, bool | int] = {f"dot {dtype}": dot_is_right(dtype) for dtype in DTYPES}
        found["cast rounds to nearest"] = narrows_to_nearest(store_casts=False)
        found["store rounds to nearest"] = narrows_to_nearest(store_casts=True)
        found["widening is exact"] = widens_exactly()
    found["others are loaded"] = others_are_loaded()
    found["language restored"] = language_state() == before
    found["failing kernel raised"] = raised_by_the_failing_kernel()
    found["language restored after a failure"] = language_state() == before
    found["dot after a failure"] = dot_is_right(torch.float32)
    found["preparations of 1 program"], found["preparations of 3 programs"] = preparations(1), preparations(3)
    print(json.dumps(found))


DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if __name__ == "__main__":
    main(corrected="corrected" in sys.argv[1:])
