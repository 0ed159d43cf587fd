"""Corrected by flashcore, Triton's interpreter computes bfloat16 as a GPU does; canaries for when it need not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flashcore.fast.interpreter import narrow, widen

ROOT = Path(__file__).resolve().parents[1]
ALL_PATTERNS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
Bits16 = NDArray[np.uint16]
Floats = NDArray[np.float32]


def by_torch(values: Floats) -> Bits16:
    """float32 to bfloat16 by PyTorch."""
    bits: Bits16 = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    return bits


def by_ml_dtypes(values: Floats) -> Bits16:
    """The same by ml_dtypes."""
    with np.errstate(all="ignore"):
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def around(low_half: int) -> Floats:
    """Every float32 whose upper half is any bfloat16 pattern and whose lower half is this one."""
    return ((ALL_PATTERNS.astype(np.uint32) << 16) | np.uint32(low_half)).view(np.float32)


def assert_same_numbers(bits: Bits16, expected: Bits16) -> None:
    """The same patterns, but any NaN for a NaN."""
    nan, expected_nan = np.isnan(widen(bits)), np.isnan(widen(expected))
    assert np.array_equal(nan, expected_nan)
    assert np.array_equal(bits[~nan], expected[~nan])


def test_widening_is_exact_for_every_pattern() -> None:
    expected = torch.from_numpy(ALL_PATTERNS.view(np.int16)).view(torch.bfloat16).float().numpy()

    assert np.array_equal(widen(ALL_PATTERNS).view(np.uint32), expected.view(np.uint32))


def test_narrowing_undoes_widening_for_every_pattern() -> None:
    assert_same_numbers(narrow(widen(ALL_PATTERNS)), ALL_PATTERNS)


@pytest.mark.parametrize("reference", [by_torch, by_ml_dtypes])
@pytest.mark.parametrize("low_half", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_narrowing_rounds_to_nearest_even_around_every_pattern(low_half: int, reference: Any) -> None:
    """Includes every tie, all subnormals, the step from the largest finite value to infinity, and every NaN."""
    values = around(low_half)

    assert_same_numbers(narrow(values), reference(values))


@pytest.mark.parametrize("reference", [by_torch, by_ml_dtypes])
def test_narrowing_rounds_any_float32(reference: Any) -> None:
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    values = patterns.view(np.float32)

    assert_same_numbers(narrow(values), reference(values))


def test_overflow_narrows_to_infinity() -> None:
    largest = float.fromhex("0x1.fep127")
    halfway = float.fromhex("0x1.ffp127")
    below = np.nextafter(np.float32(halfway), np.float32(0))

    narrowed = widen(narrow(np.array([largest, below, halfway, -halfway, np.inf], np.float32)))

    assert narrowed.tolist() == [largest, largest, np.inf, -np.inf, np.inf]


@pytest.mark.parametrize("pattern", [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7F80FFFF])
def test_a_nan_whose_upper_half_looks_infinite_stays_nan(pattern: int) -> None:
    assert np.isnan(widen(narrow(np.array([pattern], np.uint32).view(np.float32)))).all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    values = np.ones(shape, np.float32)

    assert narrow(values).shape == shape
    assert widen(narrow(values)).shape == shape


def test_strided_values_are_read_as_they_stand() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T[:, ::2]

    assert np.array_equal(widen(narrow(values)), values)


@cache
def probe(*arguments: str) -> dict[str, Any]:
    """What a fresh interpreter computes; on any machine, whatever this process runs on."""
    return output_of("tests.interpreter_probe", *arguments)


def output_of(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that a module prints when its kernels run in the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_corrected_dot_is_right(dtype: str) -> None:
    assert probe("corrected")[f"dot torch.{dtype}"]


@pytest.mark.parametrize("what", ["cast rounds to nearest", "store rounds to nearest", "widening is exact"])
def test_the_corrected_casts_are_right(what: str) -> None:
    assert probe("corrected")[what]


def test_the_dots_that_are_not_corrected_need_no_correction() -> None:
    assert probe()["dot torch.float32"]
    assert probe()["dot torch.float16"]


def test_canary_upstream_multiplies_bfloat16_wrongly() -> None:
    assert not probe()["dot torch.bfloat16"], (
        "Triton's interpreter multiplies bfloat16 matrices correctly now: "
        "delete create_dot from flashcore.fast.interpreter.correct_bfloat16, and this canary"
    )


@pytest.mark.parametrize("what", ["cast rounds to nearest", "store rounds to nearest"])
def test_canary_upstream_truncates_to_bfloat16(what: str) -> None:
    assert not probe()[what], (
        "Triton's interpreter rounds float32 to bfloat16 to nearest now: "
        "delete cast_impl from flashcore.fast.interpreter.correct_bfloat16, and this canary"
    )


def test_canary_upstream_prepares_the_language_at_every_call() -> None:
    assert probe()["preparations of 3 programs"] > probe()["preparations of 1 program"], (
        "Triton's interpreter prepares the language once a launch now: "
        "delete Language from flashcore.fast.interpreter_speed, and this canary"
    )


def test_the_language_is_prepared_from_what_the_first_launch_found_out() -> None:
    found = probe("corrected")

    assert found["preparations of 1 program"] == found["preparations of 3 programs"] == 0


@cache
def bits(*arguments: str) -> dict[str, Any]:
    """What the kernels give on drawn cases, in a fresh interpreter."""
    return output_of("tests.interpreter_bits", "16", "3", *arguments)


def test_saving_time_changes_no_bit() -> None:
    saving, upstream = bits(), bits("unknown")

    assert saving["saves time"]
    assert len(saving["digests"]) > 8
    assert saving["digests"] == upstream["digests"]


def test_an_operation_that_looks_at_data_is_not_remembered() -> None:
    """A masked load of one element asks whether what it gives instead is zero."""
    assert probe()["others are loaded"]
    assert probe("corrected")["others are loaded"]


def test_an_unknown_triton_interprets_as_it_did() -> None:
    assert not bits("unknown")["saves time"]


def test_a_launch_leaves_the_language_as_it_was() -> None:
    assert probe("corrected")["language restored"]


def test_a_kernel_that_raises_leaves_the_language_as_it_was() -> None:
    found = probe("corrected")

    assert found["failing kernel raised"]
    assert found["language restored after a failure"]
    assert found["dot after a failure"]
