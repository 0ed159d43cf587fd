"""One new token a row on a full grid: the case where reading K and V is all the work there is."""

from __future__ import annotations

from benchmarks.contest import Bench
from benchmarks.inputs import make_appending
from benchmarks.report import Row
from benchmarks.shapes import Shape, decode_shapes, interpreted_decode, rotations

# FlexAttention compiles for seconds for each shape: in the grid it runs at one length, unless asked for by name.
COMPILED_AT = (2048, "bfloat16")


def run(bench: Bench) -> None:
    """Every cell that fits."""
    for shape in decode_shapes(bench.quick) if bench.on_gpu else interpreted_decode():
        add_cell(bench, "decode", shape, (shape.kv_len, shape.dtype) == COMPILED_AT and not bench.quick)


def add_cell(bench: Bench, suite: str, shape: Shape, compiling: bool) -> None:
    """One shape."""
    count = rotations(shape.kv_bytes(), bench.l2_bytes)
    needs = int(1.1 * count * shape.kv_bytes()) + (3 << 30)
    bench.cell(
        suite,
        shape.name,
        lambda: row_of(bench, suite, shape, count, compiling),
        needs_bytes=needs if bench.on_gpu else 0,
    )


def row_of(bench: Bench, suite: str, shape: Shape, count: int, compiling: bool) -> Row:
    """Ours appends a token and attends; peers attend to buffers that already hold it."""
    sets = [make_appending(shape, bench.device, seed) for seed in range(count)]
    problems = [made.problem for made in sets]
    return bench.attention_row(suite, shape.name, shape, [made.call for made in sets], problems, compiling=compiling)
