"""The specification's own table, with the floor beside its expectation, and a verdict computed from both."""

from __future__ import annotations

from typing import Any

import torch

import flashcore
from benchmarks.contest import Bench
from benchmarks.inputs import Appending, make_appending
from benchmarks.report import Row
from benchmarks.shapes import Shape, bytes_floor_us, interpreted_decode, rotations, seed_shapes, seed_variants
from benchmarks.timing import time_on_host

WARMUP, SAMPLES = 50, 200
EXPECTED_US, EXPECTED_AT = 10.0, 2048
"""The specification expects a decode step below 10 us at 2048 cached tokens."""


def run(bench: Bench) -> None:
    """The table, then the variants that move few enough bytes."""
    if not bench.on_gpu:
        _add_cell(bench, interpreted_decode()[0], whole=True)
        return
    for shape in seed_shapes(bench.quick):
        _add_cell(bench, shape, whole=True)
    for shape in seed_variants(bench.quick):
        _add_cell(bench, shape, whole=False)


def _add_cell(bench: Bench, shape: Shape, whole: bool) -> None:
    count = rotations(shape.kv_bytes(), bench.l2_bytes)
    bench.cell("seed", shape.name, lambda: row_of(bench, shape, count, whole))


def row_of(bench: Bench, shape: Shape, count: int, whole: bool) -> Row:
    """Device time by graph replay; with ``whole`` also what the specification's host timer shows."""
    warmup, samples = (WARMUP, SAMPLES) if bench.on_gpu else (1, 2)
    sets = [make_appending(shape, bench.device, seed) for seed in range(count)]
    options: dict[str, Any] = {"warmup": warmup, "samples": samples} if bench.on_gpu else {}
    row = bench.attention_row(
        "seed",
        shape.name,
        shape,
        [made.call for made in sets],
        [made.problem for made in sets],
        compiling=whole and not bench.quick and shape.kv_len == EXPECTED_AT,
        **options,
    )
    assert row.us is not None
    if whole:
        timing = time_on_host(sets[0].call, warmup=warmup, samples=samples, synchronise=bench.synchronise)
        row.notes["host_timed_us"] = timing.us
        timing = time_on_host(_full_buffers(sets[0]), warmup=2, samples=max(2, samples // 10),
                              synchronise=bench.synchronise)  # fmt: skip
        row.notes["host_timed_full_buffers_us"] = timing.us
        row.notes["remark"] = f"host-timed {row.notes['host_timed_us']:.1f} us"
    if bench.on_gpu and shape.kv_len == EXPECTED_AT:
        row.notes["verdict"] = [verdict(shape.name, row.bytes, row.us, bench.ceilings.copy_tb_s)]
    return row


def _full_buffers(made: Appending) -> Any:
    """What the specification's own benchmark does: append to buffers that are exactly full, which must grow."""
    problem = made.problem
    batch, _, kv_len, _ = problem.key.shape
    seq_lens = torch.full((batch,), kv_len, dtype=torch.int32, device=problem.key.device)
    buffers = (problem.key, problem.value)

    def call() -> Any:
        return flashcore.attention_with_kv_cache(
            problem.query, made.key_new, made.value_new, buffers, seq_lens, cache_max_len=2 * kv_len
        )

    return call


def verdict(name: str, num_bytes: int, us: float, copy_tb_s: float, expected_us: float = EXPECTED_US) -> str:
    """Whether the expected time could be reached at all, and what was reached, in a sentence."""
    floor = bytes_floor_us(num_bytes, copy_tb_s)
    moved = f"K and V are {num_bytes / 1e6:.1f} MB, which take {floor:.1f} us at the {copy_tb_s:.2f} TB/s measured here"
    reached = f"measured {us:.1f} us, {100 * floor / us:.0f} % of copy bandwidth"
    if floor > expected_us:
        needed = num_bytes / expected_us / 1e6
        judgement = f"under {expected_us:g} us would need {needed:.1f} TB/s: out of reach of any kernel on this GPU"
    elif us < expected_us:
        judgement = f"under {expected_us:g} us: met"
    else:
        judgement = f"under {expected_us:g} us: possible, and missed"
    return f"{name}: {moved}; {reached}; {judgement}"
