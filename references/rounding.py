"""Number formats: what they can represent, how values are rounded to them, how they are stored.

A value is always a float64, in which every value of every narrower format here is exact. A stored number is a
raw bit pattern in an unsigned integer array.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
BitsArray = NDArray[np.unsignedinteger[Any]]
Mode = Literal["nearest", "toward_zero"]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with gradual underflow.

    Attributes:
        name: as dtypes are called by array libraries.
        precision: significand bits, the hidden one included.
        emin: exponent of the smallest normal number, ``2**emin``.
        max_finite: the largest finite value.
        width: bits of the stored pattern.
        has_infinity: whether overflow gives an infinity; otherwise it gives NaN.
    """

    name: str
    precision: int
    emin: int
    max_finite: float
    width: int
    has_infinity: bool = True

    @property
    def smallest_normal(self) -> float:
        """Below it the spacing of values no longer shrinks."""
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """The spacing of the values around zero."""
        return 2.0 ** (self.emin - self.precision + 1)

    def unit_roundoff(self, mode: Mode = "nearest") -> float:
        """Largest relative error of one rounding to a normal number."""
        return 2.0 ** (-self.precision if mode == "nearest" else 1 - self.precision)

    def underflow_error(self, mode: Mode = "nearest") -> float:
        """Largest absolute error of one rounding to a subnormal number (eta in the derivation)."""
        return self.smallest_subnormal / 2 if mode == "nearest" else self.smallest_subnormal


FLOAT64 = Format("float64", 53, -1022, float.fromhex("0x1.fffffffffffffp1023"), 64)
FLOAT32 = Format("float32", 24, -126, float.fromhex("0x1.fffffep127"), 32)
FLOAT16 = Format("float16", 11, -14, 65504.0, 16)
BFLOAT16 = Format("bfloat16", 8, -126, float.fromhex("0x1.fep127"), 16)
# Stored as a float32 whose last 13 bits are zero.
TFLOAT32 = Format("tfloat32", 11, -126, float.fromhex("0x1.ffcp127"), 32)
E4M3 = Format("float8_e4m3fn", 4, -6, 448.0, 8, has_infinity=False)
E5M2 = Format("float8_e5m2", 3, -14, 57344.0, 8)

FORMATS = {f.name: f for f in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16, TFLOAT32, E4M3, E5M2)}


def as_format(fmt: Format | str) -> Format:
    """The record of a format given by name, or the record itself."""
    if isinstance(fmt, Format):
        return fmt
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {', '.join(FORMATS)}, got {fmt!r}")
    return FORMATS[fmt]


def round_to(values: Any, fmt: Format | str, mode: Mode = "nearest", *, saturate: bool = False) -> Float64Array:
    """Round float64 values to the nearest value of a format, ties to even, or toward zero.

    Args:
        values: anything that converts to a float64 array.
        fmt: the format.
        mode: rounding toward zero never overflows: it stops at the largest finite value.
        saturate: in rounding to nearest, overflow gives the largest finite value.

    Returns:
        float64 array of the same shape; infinities stay (where the format has them), NaN stays NaN.
    """
    fmt = as_format(fmt)
    x = np.asarray(values, dtype=np.float64)
    if fmt.precision >= FLOAT64.precision:
        return x.copy()
    if mode == "nearest" and x.size > 0:
        magnitude = np.abs(x)
        if magnitude.max() <= fmt.max_finite:
            return _round_in_range(np.atleast_1d(x), np.atleast_1d(magnitude), fmt).reshape(x.shape)
    finite = np.isfinite(x)
    _, exponent = np.frexp(np.where(finite, x, 0.0))  # |x| in [2**(exponent-1), 2**exponent)
    # Spacing of the format's values around x. Dividing and multiplying by it is exact: it is a power of two.
    spacing = np.ldexp(1.0, np.maximum(exponent, fmt.emin + 1) - fmt.precision)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = x / spacing
        rounded = (np.rint(steps) if mode == "nearest" else np.trunc(steps)) * spacing
    ceiling = fmt.max_finite
    if mode == "nearest" and not saturate:
        ceiling = np.inf if fmt.has_infinity else np.nan
    rounded = np.where(np.abs(rounded) > fmt.max_finite, np.copysign(ceiling, x), rounded)
    infinite = np.copysign(np.inf if fmt.has_infinity else np.nan, x)
    result: Float64Array = np.where(finite, rounded, np.where(np.isnan(x), np.nan, infinite))
    return result


def _round_in_range(x: Float64Array, magnitude: Float64Array, fmt: Format) -> Float64Array:
    """``round_to`` the nearest where nothing overflows, by integer arithmetic: several times as fast."""
    bits = x.view(np.uint64)
    dropped = FLOAT64.precision - fmt.precision
    # One less than half of the last place kept, or half where that place is odd: adding it carries as rounding does.
    kept = bits >> np.uint64(dropped)
    kept &= np.uint64(1)
    kept += np.uint64((1 << (dropped - 1)) - 1)
    kept += bits
    kept &= np.uint64((1 << 64) - (1 << dropped))
    rounded: Float64Array = kept.view(np.float64)
    is_subnormal = magnitude < fmt.smallest_normal
    if is_subnormal.any():
        small = x[is_subnormal]
        shift = 1.5 * 2.0**52 * fmt.smallest_subnormal  # float64's spacing there is that of all subnormal values
        rounded[is_subnormal] = np.copysign((small + shift) - shift, small)
    return rounded


def _e4m3_values() -> Float64Array:
    """Value of each of the 128 patterns whose sign bit is clear; the last one is NaN."""
    pattern = np.arange(128)
    exponent, fraction = pattern >> 3, pattern & 7
    normal = np.ldexp(1.0 + fraction / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(fraction / 8, E4M3.emin), normal)
    values[-1] = np.nan
    return values


_E4M3_VALUES = _e4m3_values()


def decode(bits: Any, fmt: Format | str) -> Float64Array:
    """The float64 values of stored bit patterns.

    Args:
        bits: unsigned integers of the format's width.
        fmt: the format.
    """
    fmt = as_format(fmt)
    stored = np.ascontiguousarray(bits)
    if stored.dtype != np.dtype(f"uint{fmt.width}"):
        raise TypeError(f"bits must be uint{fmt.width} for {fmt.name}, got {stored.dtype}")
    shape = np.shape(bits)  # ascontiguousarray makes a scalar one-dimensional
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
        if fmt is FLOAT64:
            values = stored.view(np.float64).copy()
        elif fmt is FLOAT32 or fmt is TFLOAT32:
            values = stored.view(np.float32).astype(np.float64)
        elif fmt is FLOAT16:
            values = stored.view(np.float16).astype(np.float64)
        elif fmt is BFLOAT16:  # the upper half of a float32
            values = (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        elif fmt is E5M2:  # the upper half of a float16
            values = (stored.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
        else:
            magnitude = _E4M3_VALUES[stored & 0x7F]
            values = np.where(stored & 0x80, -magnitude, magnitude)
    return values.reshape(shape)


def encode(values: Any, fmt: Format | str, mode: Mode = "nearest") -> BitsArray:
    """Round float64 values to a format and store them; every NaN becomes the one quiet NaN.

    Returns:
        Unsigned integers of the format's width, same shape as ``values``.
    """
    fmt = as_format(fmt)
    shape = np.shape(values)
    rounded = np.ascontiguousarray(round_to(values, fmt, mode))
    rounded = np.where(np.isnan(rounded), np.nan, rounded)
    bits: BitsArray
    if fmt is FLOAT64:
        bits = rounded.view(np.uint64)
    elif fmt is FLOAT32 or fmt is TFLOAT32:
        bits = rounded.astype(np.float32).view(np.uint32)
    elif fmt is FLOAT16:
        bits = rounded.astype(np.float16).view(np.uint16)
    elif fmt is BFLOAT16:
        bits = (rounded.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif fmt is E5M2:
        bits = (rounded.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
    else:
        magnitude = np.searchsorted(_E4M3_VALUES[:-1], np.abs(rounded)).astype(np.uint8)
        bits = np.where(np.isnan(rounded), 0x7F, magnitude | (np.signbit(rounded) * 0x80)).astype(np.uint8)
    return bits.reshape(shape)
