"""Many queries at once: whole prompts, and a chunk of a prompt on what is cached of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

import flashcore
from benchmarks.contest import Bench
from benchmarks.inputs import Problem, make_appending, make_problem
from benchmarks.report import Row
from benchmarks.shapes import (
    Shape,
    chunk_shapes,
    interpreted_chunk,
    interpreted_prefill,
    prefill_shapes,
    rotations,
)

COMPILED_AT = (4096, "bfloat16")


def run(bench: Bench) -> None:
    """Every cell that fits."""
    for shape in chunk_shapes(bench.quick) if bench.on_gpu else interpreted_chunk():
        _add_cell(bench, shape, chunk_row, compiling=shape.dtype == COMPILED_AT[1] and not bench.quick)
    for shape in prefill_shapes(bench.quick) if bench.on_gpu else interpreted_prefill():
        _add_cell(bench, shape, prompt_row, (shape.kv_len, shape.dtype) == COMPILED_AT and not bench.quick)


def _add_cell(bench: Bench, shape: Shape, make: Callable[[Bench, Shape, int, bool], Row], compiling: bool) -> None:
    count = min(rotations(shape.bytes(), bench.l2_bytes), 8)
    needs = 2 * count * shape.bytes() + (6 << 30) if bench.on_gpu else 0
    bench.cell("prefill", shape.name, lambda: make(bench, shape, count, compiling), needs_bytes=needs)


def prompt_row(bench: Bench, shape: Shape, count: int, compiling: bool) -> Row:
    """Attention of a prompt to itself."""
    problems = [make_problem(shape, bench.device, seed) for seed in range(count)]

    def call_for(problem: Problem) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out = flashcore.attention(problem.query, problem.key, problem.value, is_causal=problem.is_causal)
            return cast(Tensor, out)

        return call

    ours = [call_for(problem) for problem in problems]
    return bench.attention_row("prefill", shape.name, shape, ours, problems, compiling=compiling)


def chunk_row(bench: Bench, shape: Shape, count: int, compiling: bool) -> Row:
    """New tokens on a cache; ours appends them as well."""
    sets = [make_appending(shape, bench.device, seed) for seed in range(count)]
    problems = [made.problem for made in sets]
    return bench.attention_row(
        "prefill", shape.name, shape, [made.call for made in sets], problems, compiling=compiling
    )
