"""Launching a kernel again with a few other arguments: in the interpreter, through Triton, or past it.

Triton's launcher parses all arguments of a kernel at every launch, 2 us for some fifty of them. ``ThroughDriver`` keeps
them parsed and calls the driver as that launcher does, where the compiled kernel declares that it takes what is kept.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
import triton

from flashcore.fast import interpreter

SCRATCH = 2
"""Pointers that Triton appends to a kernel's parameters; null unless the kernel asks for such memory."""


class Launch(Protocol):
    """A launch that can be repeated.

    Attributes:
        current_stream: the handle of the current stream; None in the interpreter.
    """

    current_stream: Callable[[], int | None]

    def again(self, programs: int, stream: int | None, changed: list[Any]) -> None:
        """Launch a grid with ``programs`` in its first dimension, with these arguments instead of the first ones."""


def repeated(
    kernel: Any,
    compiled: Any,
    arguments: Sequence[Any],
    options: dict[str, Any],
    changing: Sequence[str],
    outer_grid: tuple[int, int],
    device: int | None,
) -> Launch:
    """The quickest way to repeat a launch.

    Args:
        kernel: the jit function.
        compiled: what it launched, or None in the interpreter.
        arguments: its positional arguments and constexprs, in the order of its signature; addresses instead of
            tensors, except in the interpreter.
        options: num_warps and the like.
        changing: names of the arguments that each launch gives, in this order, as ``arguments`` holds them.
        outer_grid: second and third dimension of the grid.
        device: index of the device, current at each launch.
    """
    positions = [kernel.arg_names.index(name) for name in changing]
    if compiled is None:
        return Interpreted(kernel, arguments, options, positions, outer_grid)
    through_triton = ThroughTriton(compiled, arguments, positions, outer_grid, device)
    types = list(compiled.src.signature.values())
    driver = _driver()
    if driver is None or not _takes(compiled, types):
        return through_triton
    try:
        return ThroughDriver(driver, types, through_triton)
    except RefusedError:
        return through_triton


class Interpreted:
    """Runs the kernel in Triton's interpreter."""

    def __init__(
        self,
        kernel: Any,
        arguments: Sequence[Any],
        options: dict[str, Any],
        positions: list[int],
        outer_grid: tuple[int, int],
    ) -> None:
        """As ``repeated``; ``positions`` of what changes."""
        self.kernel, self.arguments, self.options = kernel, arguments, options
        self.positions, self.outer_grid = positions, outer_grid
        self.current_stream: Callable[[], int | None] = type(None)

    def again(self, programs: int, stream: int | None, changed: list[Any]) -> None:  # noqa: ARG002
        """Launch."""
        with interpreter.silent_arithmetic():
            self.kernel[programs, *self.outer_grid](*_replaced(self.arguments, self.positions, changed), **self.options)


class ThroughTriton:
    """Launches a compiled kernel by Triton's launcher."""

    def __init__(
        self,
        compiled: Any,
        arguments: Sequence[Any],
        positions: list[int],
        outer_grid: tuple[int, int],
        device: int | None,
    ) -> None:
        """As ``repeated``; ``positions`` of what changes."""
        self.compiled, self.arguments, self.positions = compiled, arguments, positions
        self.outer_grid = outer_grid
        stream_of = triton.runtime.driver.active.get_current_stream
        self.current_stream: Callable[[], int | None] = functools.partial(stream_of, device)

    def again(self, programs: int, stream: int | None, changed: list[Any]) -> None:
        """Launch."""
        compiled = self.compiled
        arguments = _replaced(self.arguments, self.positions, changed)
        compiled.run(
            programs, *self.outer_grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *arguments,
        )  # fmt: skip


def _replaced(arguments: Sequence[Any], positions: list[int], changed: Sequence[Any]) -> list[Any]:
    replaced = list(arguments)
    for position, argument in zip(positions, changed, strict=True):
        replaced[position] = argument
    return replaced


class _LaunchConfig(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]  # fmt: skip


class RefusedError(RuntimeError):
    """What the driver refused."""


class TensorMap:
    """What the tensor memory accelerator is told of a tensor, encoded by the driver: 128 bytes at ``address``."""

    BYTES, ALIGNMENT = 128, 64
    FORMATS: ClassVar = {torch.float16: 6, torch.bfloat16: 9}
    """The driver's CUtensorMapDataType."""

    def __init__(self, driver: Any, descriptor: Any, metadata: dict[str, Any]) -> None:
        """``descriptor``: Gluon's; ``metadata``: what the compiler says of its parameter.

        Raises:
            RefusedError: by the driver.
        """
        base, rank = descriptor.base, len(descriptor.shape)
        self.memory = ctypes.create_string_buffer(self.BYTES + self.ALIGNMENT)
        self.address = -(-ctypes.addressof(self.memory) // self.ALIGNMENT) * self.ALIGNMENT
        # The driver counts dimensions from the innermost, whose stride is that of an element.
        sizes = (ctypes.c_uint64 * rank)(*reversed(descriptor.shape))
        strides = (ctypes.c_uint64 * (rank - 1))(*(s * base.element_size() for s in reversed(descriptor.strides[:-1])))
        box = (ctypes.c_uint32 * rank)(*reversed(metadata["block_size"]))
        steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        interleave, promotion_to_128_bytes, fill_with_zeros = 0, 2, 0
        refused = driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address), self.FORMATS[base.dtype], rank, ctypes.c_void_p(base.data_ptr()), sizes,
            strides, box, steps, interleave, metadata["swizzle"], promotion_to_128_bytes, fill_with_zeros,
        )  # fmt: skip
        if refused:
            raise RefusedError(f"cuTensorMapEncodeTiled: error {refused}")


def _is_descriptor(type_: str) -> bool:
    return type_.startswith("tensordesc")


class ThroughDriver:
    """Launches a compiled kernel: a cell of 8 bytes an argument, those that change first."""

    def __init__(self, driver: Any, types: list[str], through_triton: ThroughTriton) -> None:
        """``types``: of the arguments, for the compiler."""
        self.through_triton = through_triton
        self.current_stream = through_triton.current_stream
        compiled, values = through_triton.compiled, through_triton.arguments
        order = [*through_triton.positions, *(i for i in range(len(types)) if i not in through_triton.positions)]
        order = [i for i in order if types[i] != "constexpr"]
        maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        self.tensor_maps = {
            i: TensorMap(driver, values[i], next(maps)) for i in sorted(order) if _is_descriptor(types[i])
        }
        cells: list[int] = []
        cells_of: dict[int, range] = {}  # each argument's
        for i in order:
            own = [values[i]]
            if i in self.tensor_maps:
                own = [*values[i].shape, *values[i].strides]
            elif types[i] == "fp32":
                own = [struct.unpack("i", struct.pack("f", values[i]))[0]]
            cells_of[i] = range(len(cells), len(cells) + len(own))
            cells += own
        self.cells = (ctypes.c_uint64 * (len(cells) + SCRATCH))(*cells)
        at, size = ctypes.addressof(self.cells), ctypes.sizeof(ctypes.c_uint64)
        places: list[int] = []
        for i in sorted(order):
            if i in self.tensor_maps:
                places.append(self.tensor_maps[i].address)
            places += [at + size * cell for cell in cells_of[i]]
        places += [at + size * cell for cell in range(len(cells), len(cells) + SCRATCH)]
        self.parameters = (ctypes.c_void_p * len(places))(*places)
        self.num_changing = len(through_triton.positions)
        metadata = compiled.metadata
        self.config = _LaunchConfig(
            grid_y=through_triton.outer_grid[0], grid_z=through_triton.outer_grid[1],
            block_x=32 * metadata.num_warps, block_y=1, block_z=1,
            shared=metadata.shared,
        )  # fmt: skip
        self.config_pointer = ctypes.byref(self.config)
        self.function = ctypes.c_void_p(compiled.function)
        self.launch = driver.cuLaunchKernelEx
        self.lock = threading.Lock()

    def again(self, programs: int, stream: int | None, changed: list[Any]) -> None:
        """Launch; Triton's launcher tries again what the driver refuses, and says why."""
        config = self.config
        with self.lock:
            self.cells[: self.num_changing] = changed
            config.grid_x = programs
            config.stream = stream
            refused = self.launch(self.config_pointer, self.function, self.parameters, None)
        if refused:
            self.through_triton.again(programs, stream, changed)


@functools.cache
def _driver() -> Any:
    """The CUDA driver's library, or None where it cannot be loaded."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _takes(compiled: Any, types: list[str]) -> bool:
    """Whether a kernel declares parameters of these types and two pointers to scratch, in PTX.

    Only plain launches count: no clusters, no dependent launches, no scratch from Triton. The driver would say the
    same, but only an error of its own tells that there are no more parameters, and tools report errors.
    """
    metadata = compiled.metadata
    special = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if metadata.target.backend != "cuda" or metadata.num_ctas != 1 or any(getattr(metadata, s, 0) for s in special):
        return False
    return declared_bytes(compiled.asm["ptx"]) == parameter_bytes(types)


def declared_bytes(ptx: str) -> list[int]:
    """Bytes of the parameters that a kernel's entry declares, in order."""
    entry = ptx.partition(".entry")[2].partition("\n)")[0]
    declared = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)[^,\[]*(?:\[(\d+)\])?", entry)
    return [int(bits) // 8 * int(count or 1) for bits, count in declared]


def parameter_bytes(types: Iterable[str]) -> list[int]:
    """Bytes of the parameters of a kernel compiled for arguments of these types; 0 for types unknown here."""
    bytes_of = {"i32": 4, "i64": 8, "fp32": 4}
    found: list[int] = []
    for type_ in types:
        if _is_descriptor(type_):
            rank = type_.partition("[")[2].partition("]")[0].count(",") + 1
            found += [TensorMap.BYTES, *[4] * rank, *[8] * rank]  # then its shape and strides
        elif type_ != "constexpr":
            found.append(8 if type_.startswith("*") else bytes_of.get(type_, 0))
    return [*found, *[8] * SCRATCH]
