"""Launches repeated through the driver: what it gets, and when Triton's own launcher is asked instead."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from flashcore.fast import launching

NAMES = ("out_ptr", "scale", "bound", "far", "TILE", "flags")
TYPES = ("*fp16", "fp32", "i32", "i64", "constexpr", "i32")
ARGUMENTS = (1 << 40, 0.125, 7, -(1 << 40), 64, -3)
TAKEN = [8, 4, 4, 8, 4, 8, 8]
STREAM, FUNCTION = 77 << 32, 99 << 32


class Driver:
    """The two functions of the CUDA driver, which note how they are called."""

    def __init__(self, sizes: list[int], status: int = 0) -> None:
        self.sizes, self.status, self.launches = sizes, status, 0
        size_pointer = ctypes.POINTER(ctypes.c_size_t)
        self.cuFuncGetParamInfo = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, size_pointer, size_pointer
        )(self.info)
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
        )(self.launch)

    def info(self, function: int, index: int, _offset: Any, size: Any) -> int:
        """The size of a parameter; an error past the last."""
        if function != FUNCTION or index >= len(self.sizes):
            return 1
        size[0] = self.sizes[index]
        return 0

    def launch(self, config: int, function: int, parameters: Any, _extra: Any) -> int:
        """Read the configuration and the parameters as the driver does."""
        self.launches += 1
        assert function == FUNCTION
        self.config = struct.unpack("7I4xQQI", ctypes.string_at(config, 52))
        raw = [ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes)]
        codes = ("Q", "f", "i", "q", "i", "Q", "Q")
        self.parameters = [struct.unpack(code, value)[0] for code, value in zip(codes, raw, strict=True)]
        return self.status


class Triton:
    """A compiled kernel."""

    def __init__(self, **metadata: Any) -> None:
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
    compiled, driver = Triton(), Driver(TAKEN)
    launch = repeated(monkeypatch, compiled, driver)

    launch.again(5, launch.current_stream(), [9, 1 << 42])
    launch.again(6, launch.current_stream(), [8, 1 << 41])

    assert driver.config == (6, 2, 1, 128, 1, 1, 4096, STREAM + 3, 0, 0)
    assert driver.parameters == [1 << 41, 0.125, 8, -(1 << 40), -3, 0, 0]
    assert (driver.launches, compiled.calls) == (2, [])


def test_triton_launches_what_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, driver = Triton(), Driver(TAKEN, status=201)

    launch = repeated(monkeypatch, compiled, driver)
    launch.again(6, launch.current_stream(), [8, 1 << 41])

    assert (driver.launches, compiled.calls) == (1, [THROUGH_TRITON])


@pytest.mark.parametrize(
    ("driver", "metadata"),
    [
        (None, {}),
        (Driver(TAKEN[:-1]), {}),
        (Driver([*TAKEN, 8]), {}),
        (Driver([8, 4, 8, 8, 4, 8, 8]), {}),
        (SimpleNamespace(), {}),
        (Driver(TAKEN), {"num_ctas": 2}),
        (Driver(TAKEN), {"launch_pdl": True}),
        (Driver(TAKEN), {"global_scratch_size": 128}),
        (Driver(TAKEN), {"target": SimpleNamespace(backend="hip")}),
    ],
)
def test_triton_launches_what_is_not_known_to_the_driver_as_it_is_kept(
    monkeypatch: pytest.MonkeyPatch, driver: Any, metadata: dict[str, Any]
) -> None:
    compiled = Triton(**metadata)

    launch = repeated(monkeypatch, compiled, driver)
    launch.again(6, launch.current_stream(), [8, 1 << 41])

    assert compiled.calls == [THROUGH_TRITON]
