"""Every shipped tile compiles for sm_80, sm_90 and sm_100 without spilling, contracting, or too much shared memory.

The prefill kernel for Hopper may spill outside its loop over tiles of keys, where two warpgroups need what they share.
The interpreter knows neither registers nor shared memory. No GPU is needed to compile for one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory a program may use, by architecture: CUDA C++ Programming Guide, technical specifications."""

Result = dict[str, Any]


@cache
def compiled(arch: int) -> tuple[Result, ...]:
    """What became of each configuration, compiled in processes without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", "--arch", str(arch), "--jobs", str(os.cpu_count() or 1)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(line) for line in done.stdout.splitlines())


def name(result: Result) -> str:
    """The configuration in words."""
    return (
        f"sm_{result['arch']} {result['dtype']} {result['kernel']} block_m={result['block_m']} "
        f"block_n={result['block_n']} block_new={result['block_new']} block_d={result['block_d']} "
        f"num_warps={result['num_warps']} num_stages={result['num_stages']}"
    )


def spilled(results: tuple[Result, ...]) -> list[str]:
    """Configurations with accesses to local memory."""
    return [f"{name(r)}: {r['spills']} spills, {r['registers']} registers" for r in results if r["spills"]]


def contracted(results: tuple[Result, ...]) -> list[str]:
    """Configurations for matrix units, which multiply and add by themselves, with fused multiply-adds beside them."""
    return [f"{name(r)}: {r['fused']} fused" for r in results if r["fused"] and r["dtype"] != "float32"]


def too_large(results: tuple[Result, ...]) -> list[str]:
    """Configurations that need more shared memory than there is."""
    return [
        f"{name(r)}: {r['shared_bytes']} bytes of shared memory, at most {SHARED_BYTES[r['arch']]}"
        for r in results
        if r["shared_bytes"] > SHARED_BYTES[r["arch"]]
    ]


@pytest.mark.parametrize("arch", list(SHARED_BYTES))
def test_every_shipped_tile_compiles_without_spills_and_fits(arch: int) -> None:
    results = compiled(arch)

    assert {(r["kernel"], r["dtype"]) for r in results} == {
        *((kernel, dtype) for kernel in ("split", "prefill") for dtype in ("float16", "bfloat16", "float32")),
        *([("prefill_sm90", "float16"), ("split_sm90", "float16")] if arch == 90 else []),
    }
    assert spilled(results) + too_large(results) + contracted(results) == []
    assert [r for r in results if r["parameter_bytes"] != r["launched_bytes"] and r["kernel"] != "prefill_sm90"] == []
    assert [name(r) for r in results if r["is_decode"] and not r["loads_first"]] == []


def test_two_programs_of_a_decode_step_fit_on_a_multiprocessor_of_hopper() -> None:
    programs = [r for r in compiled(90) if r["kernel"] == "split_sm90"]

    assert len(programs) == 6
    assert [name(r) for r in programs if 2 * (r["shared_bytes"] + 1024) > 228 * 1024] == []  # 1024 of each are taken
    assert [name(r) for r in programs if 2 * 128 * r["registers"] > 65536] == []


def test_a_spill_a_contraction_and_too_much_shared_memory_are_seen() -> None:
    fine: Result = {
        "arch": 80, "dtype": "float16", "kernel": "split", "block_m": 16, "block_n": 64, "block_new": 16, "block_d": 64,
        "num_warps": 4, "num_stages": 3, "registers": 255, "spills": 0, "fused": 0,
        "shared_bytes": 163 * 1024,
    }  # fmt: skip

    assert spilled((fine,)) + too_large((fine,)) + contracted((fine,)) == []
    assert "1 fused" in contracted(({**fine, "fused": 1},))[0]
    assert "sm_80 float16 split block_m=16" in spilled(({**fine, "spills": 1},))[0]
    assert "166913 bytes" in too_large(({**fine, "shared_bytes": 163 * 1024 + 1},))[0]
