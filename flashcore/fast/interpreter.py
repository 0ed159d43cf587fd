"""Triton's CPU interpreter, corrected where it is wrong about bfloat16.

The interpreter keeps bfloat16 as uint16 bit patterns. Two of its operations matter to an attention
kernel and are wrong (Triton 3.6 and 3.9, triton-lang/triton issues 10945, 11584 and 11605):

* ``tl.dot`` multiplies the bit patterns as if they were integers;
* casts from float32 truncate instead of rounding to nearest, ties to even.

``correct_bfloat16`` replaces both by what the hardware does. The kernels stay as they are: the source
that the interpreter runs is the source that the GPU compiles. ``tests/test_interpreter.py`` holds
a canary that fails once upstream is right, so that this module can go.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import triton
import triton.language as tl

_ON = bool(triton.knobs.runtime.interpret)


def is_on() -> bool:
    """Whether flashcore's kernels run in the interpreter.

    ``TRITON_INTERPRET`` counts at the moment they are decorated: setting it after the import changes nothing.
    """
    return _ON


def silent_arithmetic() -> AbstractContextManager[None]:
    """Overflow and NaN are values here, as on a GPU: no NumPy warnings from interpreted kernels."""
    return np.errstate(all="ignore")


def widen(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bfloat16 bit patterns (uint16) to float32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 to bfloat16 bit patterns (uint16), rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    quiet_nan = (bits >> 16) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def correct_bfloat16() -> None:
    """Correct the interpreter's ``tl.dot`` and float32 <-> bfloat16 casts; a second call does nothing."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if hasattr(builder, "flashcore_corrected"):
        return
    handle: Any = interpreter.TensorHandle
    original_dot, original_cast = builder.create_dot, builder.cast_impl

    def as_float32(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return handle(widen(operand.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original_dot(self, as_float32(a), as_float32(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return handle(narrow(src.data), tl.bfloat16)
        if source == tl.bfloat16 and target == tl.float32:
            return handle(widen(src.data), tl.float32)
        return original_cast(self, src, dst_type)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    builder.flashcore_corrected = True
