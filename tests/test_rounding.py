"""Rounding against exact rational arithmetic, and against NumPy, ml_dtypes and torch for every pattern."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from references.rounding import (
    BFLOAT16,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FORMATS,
    TFLOAT32,
    Format,
    Mode,
    as_format,
    decode,
    encode,
    round_to,
)

NARROW = [FLOAT16, BFLOAT16, TFLOAT32, FLOAT32, E4M3, E5M2]
STORED: list[tuple[Format, Any]] = [
    (FLOAT16, np.float16),
    (BFLOAT16, ml_dtypes.bfloat16),
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
]
TORCH = [
    (FLOAT16, torch.float16),
    (BFLOAT16, torch.bfloat16),
    (E4M3, torch.float8_e4m3fn),
    (E5M2, torch.float8_e5m2),
]


def every_pattern(fmt: Format) -> NDArray[Any]:
    return np.arange(2**fmt.width).astype(f"uint{fmt.width}")


def positive_values(fmt: Format) -> NDArray[np.float64]:
    """Zero and every positive finite value of an 8- or 16-bit format, ascending."""
    values = decode(every_pattern(fmt), fmt)
    return np.unique(np.abs(values[np.isfinite(values)]))


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal bits, where any NaN equals any NaN."""
    return bool(np.all((a.view(np.uint64) == b.view(np.uint64)) | (np.isnan(a) & np.isnan(b))))


@pytest.mark.parametrize(("fmt", "dtype"), STORED, ids=lambda x: getattr(x, "name", ""))
def test_every_stored_pattern_decodes_to_the_library_s_value(fmt: Format, dtype: Any) -> None:
    bits = every_pattern(fmt)

    with np.errstate(invalid="ignore"):
        assert same(decode(bits, fmt), bits.view(dtype).astype(np.float64))


@pytest.mark.parametrize("fmt", [fmt for fmt, _ in STORED], ids=lambda f: f.name)
def test_every_stored_pattern_survives_the_round_trip(fmt: Format) -> None:
    bits = every_pattern(fmt)
    values = decode(bits, fmt)
    is_number = ~np.isnan(values)

    assert np.array_equal(encode(values, fmt)[is_number], bits[is_number])
    assert np.isnan(decode(encode(values, fmt), fmt)[~is_number]).all()
    assert is_number.sum() > 0.9 * len(bits)


@pytest.mark.parametrize(("fmt", "dtype"), STORED, ids=lambda x: getattr(x, "name", ""))
@pytest.mark.parametrize("source", [FLOAT16, BFLOAT16], ids=lambda f: f.name)
def test_all_16_bit_values_round_as_in_ml_dtypes(fmt: Format, dtype: Any, source: Format) -> None:
    values = decode(every_pattern(source), source)

    with np.errstate(all="ignore"):
        assert same(round_to(values, fmt), values.astype(dtype).astype(np.float64))


@pytest.mark.parametrize(("fmt", "dtype"), TORCH, ids=lambda x: getattr(x, "name", ""))
def test_float32_values_around_every_boundary_round_as_in_torch(fmt: Format, dtype: torch.dtype) -> None:
    grid = positive_values(fmt)
    middles = (grid[1:] + grid[:-1]) / 2
    points = np.concatenate([grid, middles, [fmt.max_finite * 1.01, fmt.max_finite * 1.2, 1e38]])
    with np.errstate(over="ignore"):
        points = points.astype(np.float32)
        points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, -points)])
    points = np.concatenate([points, -points])
    if not fmt.has_infinity:  # beyond, some versions of torch saturate and some give NaN
        points = points[np.abs(points) <= 464]

    theirs = torch.from_numpy(points).to(dtype).to(torch.float64).numpy()

    assert same(round_to(points, fmt), theirs)


def exactly_rounded(x: Fraction, fmt: Format, mode: Mode) -> Fraction | None:
    """The rounded value by definition, in rational arithmetic; None beyond the largest finite value."""
    magnitude = abs(x)
    exponent = max(fmt.emin, magnitude.numerator.bit_length() - magnitude.denominator.bit_length())
    exponent -= exponent > fmt.emin and magnitude < Fraction(2) ** exponent
    spacing = Fraction(2) ** (exponent - fmt.precision + 1)
    steps, rest = divmod(magnitude, spacing)
    if mode == "nearest" and (rest * 2 > spacing or (rest * 2 == spacing and steps % 2 == 1)):
        steps += 1
    rounded = steps * spacing
    if rounded > Fraction(fmt.max_finite):
        return Fraction(fmt.max_finite) * (-1 if x < 0 else 1) if mode == "toward_zero" else None
    return -rounded if x < 0 else rounded


@pytest.mark.parametrize("mode", ["nearest", "toward_zero"])
@pytest.mark.parametrize("fmt", NARROW, ids=lambda f: f.name)
def test_rounding_is_the_definition_in_rational_arithmetic(fmt: Format, mode: Mode) -> None:
    rng = np.random.default_rng(0)
    low, high = fmt.emin - fmt.precision - 3, int(np.log2(fmt.max_finite)) + 1
    spread = np.ldexp(rng.uniform(1, 2, 600), rng.integers(low, high + 1, 600))
    on_grid = round_to(spread, fmt, "toward_zero")
    steps = np.ldexp(1.0, np.maximum(np.frexp(on_grid)[1] - 1, fmt.emin) - fmt.precision + 1)
    ties = on_grid + steps / 2
    edges = fmt.max_finite * np.array([1 - 2.0**-20, 1, 1 + 2.0**-20, 1.02, 1.035, 1.05, 1.5])
    tiny = fmt.smallest_subnormal * np.array([0.0, 0.25, 0.5, 0.5 + 2.0**-40, 0.75, 1, 1.5, 2.5])
    x = np.concatenate([spread, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf), edges, tiny])
    x = np.concatenate([x, -x])

    rounded = round_to(x, fmt, mode)

    overflowed = 0
    for value, ours in zip(x, rounded, strict=True):
        exact = exactly_rounded(Fraction(value), fmt, mode)
        if exact is None:
            overflowed += 1
            assert np.isnan(ours) if not fmt.has_infinity else ours == np.copysign(np.inf, value)
        else:
            assert Fraction(ours) == exact
    assert (overflowed > 0) == (mode == "nearest")
    inside = np.abs(x) <= fmt.max_finite  # without the others it goes another way
    assert same(round_to(x[inside], fmt, mode), rounded[inside])
    assert same(np.array([round_to(value, fmt, mode) for value in x[inside][::50]]), rounded[inside][::50])


@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16, E4M3, E5M2], ids=lambda f: f.name)
def test_the_errors_stated_for_a_format_are_attained_and_never_exceeded(fmt: Format) -> None:
    grid = positive_values(fmt)
    middles = (grid[1:] + grid[:-1]) / 2
    normal = middles >= fmt.smallest_normal
    below_next = np.nextafter(grid[1:], 0)

    nearest = np.abs(round_to(middles, fmt) - middles)
    cut = np.abs(round_to(below_next, fmt, "toward_zero") - below_next)

    # Half way above a power of two the error is u out of 1 + u.
    relative = (nearest / middles)[normal]
    assert relative.max() == fmt.unit_roundoff() / (1 + fmt.unit_roundoff())
    assert nearest[~normal].max() == fmt.underflow_error()
    relative_cut = (cut / below_next)[below_next >= fmt.smallest_normal]
    ulp = fmt.unit_roundoff("toward_zero")
    assert 0.999 * ulp / (1 + ulp) < relative_cut.max() <= ulp
    assert cut[below_next < fmt.smallest_normal].max() <= fmt.underflow_error("toward_zero")
    assert grid[1] == fmt.smallest_subnormal
    assert grid[-1] == fmt.max_finite


def test_float32_is_the_machine_s_float32() -> None:
    info = np.finfo(np.float32)

    assert FLOAT32.max_finite == float(info.max)
    assert FLOAT32.smallest_normal == float(info.smallest_normal)
    assert FLOAT32.smallest_subnormal == float(info.smallest_subnormal)
    assert FLOAT32.unit_roundoff() == float(info.eps) / 2
    assert FLOAT64.max_finite == float(np.finfo(np.float64).max)


def test_float64_is_left_alone() -> None:
    x = np.array([0.1, -0.0, 5e-324, np.inf, 1.7e308])

    assert same(round_to(x, FLOAT64), x)
    assert same(decode(encode(x, FLOAT64), FLOAT64), x)


@pytest.mark.parametrize("mode", ["nearest", "toward_zero"])
@pytest.mark.parametrize("fmt", [FLOAT32, FLOAT16, BFLOAT16, TFLOAT32, E5M2], ids=lambda f: f.name)
def test_infinities_zeros_and_nan_keep_their_kind_and_sign(fmt: Format, mode: Mode) -> None:
    x = np.array([np.inf, -np.inf, 0.0, -0.0, np.nan])

    assert same(decode(encode(x, fmt, mode), fmt), x)


def test_saturation_stops_at_the_largest_finite_value() -> None:
    assert round_to(1e9, E4M3, saturate=True) == 448.0
    assert round_to(-1e9, FLOAT16, saturate=True) == -65504.0
    assert np.isnan(round_to(1e9, E4M3))
    assert np.isnan(round_to(np.inf, E4M3))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    x = np.ones(shape)

    assert encode(x, "bfloat16").shape == shape
    assert decode(encode(x, "bfloat16"), "bfloat16").shape == shape
    assert round_to(x, "bfloat16").shape == shape


def test_strided_bits_decode_like_contiguous_ones() -> None:
    bits = np.arange(0, 64, dtype=np.uint16).reshape(8, 8) << 8

    assert np.array_equal(decode(bits.T, "float16"), decode(bits.T.copy(), "float16"))


def test_an_unknown_format_and_bits_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError) as unknown:
        as_format("float8")
    with pytest.raises(TypeError) as width:
        decode(np.zeros(3, dtype=np.uint32), "float16")

    assert str(unknown.value) == f"fmt must be one of {', '.join(FORMATS)}, got 'float8'"
    assert str(width.value) == "bits must be uint16 for float16, got uint32"
    assert decode(np.zeros(3, dtype=np.uint16), "float16").tolist() == [0.0, 0.0, 0.0]
