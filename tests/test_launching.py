"""Launches repeated through the driver: what it gets, and when Triton's own launcher is asked instead."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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
    """The launch of a grid [., 2, 5], with "bound" and "out_ptr" changing."""
    active = SimpleNamespace(get_current_stream=lambda device: STREAM + device)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(launching, "_driver", lambda: driver)
    kernel = SimpleNamespace(arg_names=NAMES)
    return launching.repeated(kernel, compiled, ARGUMENTS, {}, ["bound", "out_ptr"], (2, 5), 3)


THROUGH_TRITON = (6, 2, 5, STREAM + 3, FUNCTION, (4, 1, 4096), None, None, None, 1 << 41, 0.125, 8, *ARGUMENTS[3:])


def test_the_driver_gets_every_argument_where_the_kernel_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, driver = Triton(), Driver()
    launch = repeated(monkeypatch, compiled, driver)

    launch.again(5, launch.current_stream(), [9, 1 << 42])
    launch.again(6, launch.current_stream(), [8, 1 << 41])

    assert driver.config == (6, 2, 5, 128, 1, 1, 4096, STREAM + 3, 0, 0)
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


DESCRIBED = "tensordesc<fp16[1, 1, 64, 128],NVMMASharedLayout(swizzle_byte_width=128)>"
MAP = (".align 64 .b8 kernel_map[128]", *(".u32",) * 4, *(".u64",) * 4)


class Mapping:
    """The function of the CUDA driver that encodes tensor maps, which notes how it is called."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        integers, addresses = ctypes.c_uint32, ctypes.c_void_p
        self.cuTensorMapEncodeTiled = ctypes.CFUNCTYPE(
            ctypes.c_int, addresses, integers, integers, addresses, *(addresses,) * 4, *(integers,) * 4
        )(self.encode)

    def encode(
        self, at: int, format_: int, rank: int, base: int, sizes: int, strides: int, box: int, steps: int, *modes: int
    ) -> int:
        """Read the arguments as the driver does; the map is 128 bytes of 7."""
        self.aligned = at % 64 == 0
        self.modes = (format_, rank, base, *modes)
        self.shape = struct.unpack(f"{rank}Q", ctypes.string_at(sizes, 8 * rank))
        self.strides = struct.unpack(f"{rank - 1}Q", ctypes.string_at(strides, 8 * (rank - 1)))
        self.box = struct.unpack(f"{rank}I", ctypes.string_at(box, 4 * rank))
        self.steps = struct.unpack(f"{rank}I", ctypes.string_at(steps, 4 * rank))
        ctypes.memset(at, 7, 128)
        return self.status


def described() -> tuple[torch.Tensor, SimpleNamespace]:
    """A cache, and what Gluon's descriptor of it has."""
    cache = torch.empty(2, 3, 100, 128, dtype=torch.bfloat16)
    return cache, SimpleNamespace(base=cache, shape=list(cache.shape), strides=list(cache.stride()))


META = {"block_size": [1, 1, 64, 64], "swizzle": 3}


def test_a_tensor_map_is_encoded_from_the_innermost_dimension_on() -> None:
    cache, descriptor = described()
    driver = Mapping()

    tensor_map = launching.TensorMap(driver, descriptor, META)

    assert (driver.shape, driver.strides) == ((128, 100, 3, 2), (256, 25600, 76800))
    assert (driver.box, driver.steps) == ((64, 64, 1, 1), (1, 1, 1, 1))
    bfloat16, swizzle_128, promotion_128 = 9, 3, 2
    assert driver.modes == (bfloat16, 4, cache.data_ptr(), 0, swizzle_128, promotion_128, 0)
    assert driver.aligned
    assert ctypes.string_at(tensor_map.address, 128) == bytes([7] * 128)
    with pytest.raises(launching.RefusedError, match="cuTensorMapEncodeTiled: error 1"):
        launching.TensorMap(Mapping(status=1), descriptor, META)


@pytest.mark.parametrize("status", [0, 1])
def test_a_kernel_gets_the_map_of_a_tensor_then_its_shape_and_strides(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    _, descriptor = described()
    names, types = ("out_ptr", "cache_desc", "bound"), ("*fp16", DESCRIBED, "i32")
    compiled = Triton((".u64 .ptr .global .align 1", *MAP, ".u32", ".u64", ".u64"), tensordesc_meta=[META])
    compiled.src = SimpleNamespace(signature=dict(zip(names, types, strict=True)))
    driver: Any = Driver()
    driver.cuTensorMapEncodeTiled = Mapping(status).cuTensorMapEncodeTiled
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_stream=lambda _: STREAM))
    monkeypatch.setattr(launching, "_driver", lambda: driver)
    found: list[bytes] = []

    def launch(_config: int, _function: int, parameters: Any, _extra: Any) -> int:
        sizes = (8, 128, *[4] * 4, *[8] * 4, 4, 8, 8)
        found.extend(ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes))
        return 0

    driver.cuLaunchKernelEx = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
    )(launch)

    kernel, arguments = SimpleNamespace(arg_names=names), (1, descriptor, 5)
    launching.repeated(kernel, compiled, arguments, {}, ["bound", "out_ptr"], (8, 2), 0).again(1, STREAM, [9, 1 << 42])

    if status:  # then Triton encodes it, or says why not
        assert (found, len(compiled.calls)) == ([], 1)
        return
    numbers = [int.from_bytes(value, "little") for value in found if len(value) < 128]
    assert found[1] == bytes([7] * 128)
    assert numbers == [1 << 42, *descriptor.shape, *descriptor.strides, 9, 0, 0]
    assert compiled.calls == []
