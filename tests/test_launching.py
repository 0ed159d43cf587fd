"""Launches repeated through the driver: what it gets, and when Triton's own launcher is asked instead."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from flashcore.fast import launching

NAMES = ("out_ptr", "scale", "bound", "far", "TILE", "flags")
TYPES = ("*fp16", "fp32", "i32", "i64", "constexpr", "i32")
ARGUMENTS = (1 << 40, 0.125, 7, -(1 << 40), 64, -3)
TAKEN = [8, 4, 4, 8, 4, 8, 8]
DECLARED = (".u64 .ptr .global .align 1", ".f32", ".u32", ".u64", ".u32", *(".u64 .ptr .global .align 1",) * 2)
STREAM, FUNCTION = 77 << 32, 99 << 32


class Driver:
    """The function of the CUDA driver that launches, which notes how it is called."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.launches = status, 0
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
        )(self.launch)

    def launch(self, config: int, function: int, parameters: Any, _extra: Any) -> int:
        """Read the configuration and the parameters as the driver does."""
        self.launches += 1
        assert function == FUNCTION
        self.config = struct.unpack("7I4xQQI", ctypes.string_at(config, 52))
        raw = [ctypes.string_at(parameters[i], size) for i, size in enumerate(TAKEN)]
        codes = ("Q", "f", "i", "q", "i", "Q", "Q")
        self.parameters = [struct.unpack(code, value)[0] for code, value in zip(codes, raw, strict=True)]
        return self.status


def ptx(declared: Sequence[str]) -> str:
    """A kernel with such parameters, after a function with one."""
    parameters = ",\n".join(f"\t.param {words} kernel_param_{i}" for i, words in enumerate(declared))
    return f".func (.param .b32 out) other(.param .b64 in)\n.visible .entry kernel(\n{parameters}\n)\n{{ ret; }}\n"


class Triton:
    """A compiled kernel."""

    def __init__(self, declared: Sequence[str] = DECLARED, **metadata: Any) -> None:
        self.asm = {"ptx": ptx(declared)}
        self.calls: list[tuple[Any, ...]] = []
        self.src = SimpleNamespace(signature=dict(zip(NAMES, TYPES, strict=True)))
        self.function, self.packed_metadata = FUNCTION, (4, 1, 4096)
        plain = {"num_warps": 4, "num_ctas": 1, "shared": 4096, "target": SimpleNamespace(backend="cuda")}
        self.metadata = SimpleNamespace(**plain | metadata)

    def run(self, *arguments: Any) -> None:
        """Triton's launcher."""
        self.calls.append(arguments)


def repeated(monkeypatch: pytest.MonkeyPatch, compiled: Triton, driver: Driver | None) -> launching.Launch:
    """The launch of two row tiles, with "bound" and "out_ptr" changing."""
    active = SimpleNamespace(get_current_stream=lambda device: STREAM + device)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(launching, "_driver", lambda: driver)
    kernel = SimpleNamespace(arg_names=NAMES)
    return launching.repeated(kernel, compiled, ARGUMENTS, {}, ["bound", "out_ptr"], 2, 3)


THROUGH_TRITON = (6, 2, 1, STREAM + 3, FUNCTION, (4, 1, 4096), None, None, None, 1 << 41, 0.125, 8, *ARGUMENTS[3:])


def test_the_driver_gets_every_argument_where_the_kernel_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, driver = Triton(), Driver()
    launch = repeated(monkeypatch, compiled, driver)

    launch.again(5, launch.current_stream(), [9, 1 << 42])
    launch.again(6, launch.current_stream(), [8, 1 << 41])

    assert driver.config == (6, 2, 1, 128, 1, 1, 4096, STREAM + 3, 0, 0)
    assert driver.parameters == [1 << 41, 0.125, 8, -(1 << 40), -3, 0, 0]
    assert (driver.launches, compiled.calls) == (2, [])


def test_triton_launches_what_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, driver = Triton(), Driver(status=201)

    launch = repeated(monkeypatch, compiled, driver)
    launch.again(6, launch.current_stream(), [8, 1 << 41])

    assert (driver.launches, compiled.calls) == (1, [THROUGH_TRITON])


@pytest.mark.parametrize(
    ("driver", "declared", "metadata"),
    [
        (None, DECLARED, {}),
        (Driver(), DECLARED[:-1], {}),
        (Driver(), (*DECLARED, ".u64"), {}),
        (Driver(), (*DECLARED[:2], ".u64", *DECLARED[3:]), {}),
        (Driver(), (), {}),
        (Driver(), DECLARED, {"num_ctas": 2}),
        (Driver(), DECLARED, {"launch_pdl": True}),
        (Driver(), DECLARED, {"global_scratch_size": 128}),
        (Driver(), DECLARED, {"target": SimpleNamespace(backend="hip")}),
    ],
)
def test_triton_launches_what_is_not_known_to_take_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, declared: Sequence[str], metadata: dict[str, Any]
) -> None:
    compiled = Triton(declared, **metadata)

    launch = repeated(monkeypatch, compiled, driver)
    launch.again(6, launch.current_stream(), [8, 1 << 41])

    assert compiled.calls == [THROUGH_TRITON]
    assert driver is None or driver.launches == 0
