"""Compile every shipped kernel configuration for GPUs that are not here, and print what ptxas made of each.

    python tests/compile_kernels.py [--arch 80 90 100] [--jobs N]

One JSON line a configuration: registers, spills (accesses of local memory), fused multiply-adds, shared memory.
Must run without TRITON_INTERPRET, since the kernels have to be compiled; ``tests/test_compiles.py`` runs it and judges
the lines.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from flashcore.fast import launching, sm90, tuning
from flashcore.fast.kernels.prefill import prefill_attention
from flashcore.fast.kernels.prefill_sm90 import prefill_attention_sm90
from flashcore.fast.kernels.primitives import LENGTHS
from flashcore.fast.kernels.split_kv import split_kv_attention
from flashcore.fast.kernels.split_kv_sm90 import split_kv_attention_sm90

KERNELS = {
    "split": split_kv_attention, "split_sm90": split_kv_attention_sm90,
    "prefill": prefill_attention, "prefill_sm90": prefill_attention_sm90,
}  # fmt: skip
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ROWS = (1, 8, 16, 32, 1024)
"""(query, head) rows a kv head that reach every tile of ``tuning.plan``."""

Configuration = tuple[torch.dtype, tuning.LaunchPlan, dict[str, Any], dict[str, int | bool]]
"""dtype, plan, constexprs, and the compiler's options."""


def plans(dtype: torch.dtype, head_dim: int, arch: int) -> list[tuning.LaunchPlan]:
    """Every tile for rows that are all one head (the widest tile of new tokens), or all one query (the narrowest)."""
    shapes = {(rows, 1) for rows in ROWS} | {(1, rows) for rows in ROWS}
    found = {
        tuning.plan(q_len=q_len, group_size=group_size, head_dim=head_dim, dtype=dtype, arch=arch)
        for q_len, group_size in shapes
    }
    return sorted(found, key=str)


def configurations(arch: int) -> Iterator[Configuration]:
    """Every distinct plan for one architecture, with the flags that make the largest kernel.

    bfloat16 is compiled for the largest head_dim alone: its kernels differ from float16's in the type of the matrix
    instruction and in one conversion of P, and need the same tiles and registers to within a few.
    """
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        if dtype == torch.bfloat16 and head_dim != max(HEAD_DIMS):
            continue
        # Several splits a program; few registers; rows that are not split.
        kinds = ((False, False, False), (True, False, False), (False, True, False), (False, True, True))
        for plan, (several, crowded, unsplit) in itertools.product(plans(dtype, head_dim, arch), kinds):
            if several and not plan.one_query:
                continue
            if plan.merge_m == 8 and (unsplit or not crowded):
                continue  # only there are 16 rows merged in a smaller tile
            longest = 1 if unsplit else 1 << 20
            if crowded and not plan.share_out(2, longest, longest, is_even=False, gpu=tuning.Gpu(1, 0.0)).is_crowded:
                continue
            flags = {
                "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "MASK_D": True,
                "WIDE": False,
            }  # fmt: skip
            if plan.path == "split":
                flags |= {"BLOCK_NEW": plan.block_new, "ONE_QUERY": plan.one_query, "SEVERAL": several}
                flags |= {"UNSPLIT": unsplit, "MERGE_M": plan.merge_m, "PREFETCH": True}
            yield dtype, plan, flags, plan.compiler_options(several=several, crowded=crowded)
    if arch == 90:
        yield from ((torch.float16, p, sm90.constants(p), p.compiler_options()) for p in hopper_plans())
        yield from ((torch.float16, p, sm90.split_constants(p), p.compiler_options()) for p in hopper_decode_plans())


def hopper_decode_plans() -> Iterator[tuning.LaunchPlan]:
    """Those of the decode kernel for Hopper, like ``hopper_plans``."""
    for head_dim, group_size in itertools.product(tuning.SM90_DECODE_KEYS, (1, 8, 16)):
        plan = tuning.plan(q_len=1, group_size=group_size, head_dim=head_dim, dtype=torch.float16, arch=90)
        yield dataclasses.replace(
            plan, path="split_sm90", block_m=max(tuning.SM90_LEAST_HEADS, group_size),
            block_n=tuning.SM90_DECODE_KEYS[head_dim], num_stages=tuning.SM90_STAGES, num_warps=4,
        )  # fmt: skip


def hopper_plans() -> Iterator[tuning.LaunchPlan]:
    """Those of the prefill kernel for Hopper, whether or not this Triton's build of it was ever run."""
    for head_dim, tiles_of_rows in tuning.SM90_TILES.items():
        plan = tuning.plan(q_len=1024, group_size=1, head_dim=head_dim, dtype=torch.float16, arch=90)
        for block_m, tiles in tiles_of_rows.items():
            block_n, num_stages = tiles.block_n, tiles.num_stages
            yield dataclasses.replace(
                plan, path="prefill_sm90", block_m=block_m, block_n=block_n, num_stages=num_stages, num_warps=4
            )


def compile_one(
    dtype: torch.dtype, plan: tuning.LaunchPlan, flags: dict[str, Any], options: dict[str, int | bool], arch: int
) -> dict[str, Any]:
    """Compile one configuration for one architecture."""
    kernel: Any = KERNELS[plan.path]
    pointer_types = {
        "lse_ptr": "*fp32", "seq_lens_out_ptr": "*i32", "partial_out_ptr": "*fp32", "partial_m_ptr": "*fp32",
        "partial_l_ptr": "*fp32", "arrivals_ptr": "*i32", "fault_ptr": "*i32", "seq_lens_ptr": "*i32",
        "new_lens_ptr": "*i32",
    }  # fmt: skip
    signature, attributes = {}, {}
    layout = sm90.layout(dtype, plan) if plan.path.endswith("sm90") else None
    for position, name in enumerate(kernel.arg_names):
        if name in flags:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            signature[name] = f"tensordesc<{DTYPES[dtype][1:]}[1, 1, {plan.block_n}, {plan.block_d}],{layout!r}>"
        elif name.endswith("_ptr"):
            signature[name] = pointer_types.get(name, DTYPES[dtype])
            if name not in LENGTHS:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "qk_scale" else "i32"
    compiled = triton.compile(
        (ASTSource if layout is None else GluonASTSource)(kernel, signature, flags, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    registers, spills = registers_and_spills(compiled.asm["cubin"], in_loop=plan.path == "prefill_sm90")
    return {
        "arch": arch, "dtype": str(dtype).removeprefix("torch."), "kernel": plan.path, "block_m": plan.block_m,
        "block_n": plan.block_n, "block_new": plan.block_new, "block_d": plan.block_d,
        "num_warps": plan.num_warps, "num_stages": options["num_stages"],
        "registers": registers, "spills": spills, "fused": compiled.asm["ptx"].count("fma.rn.f32"),
        "shared_bytes": compiled.metadata.shared,
        "is_decode": bool(flags.get("ONE_QUERY")), "loads_first": loads_first(compiled.asm["ptx"]),
        "parameter_bytes": launching.declared_bytes(compiled.asm["ptx"]),
        "launched_bytes": launching.parameter_bytes(signature.values()),
    }  # fmt: skip


def loads_first(ptx: str) -> bool:
    """Whether a tile is prefetched, and tiles are asked for, before anything is waited for in shared memory."""
    prefetched, asked_for = ptx.find("prefetch.global.L2"), ptx.find("cp.async")
    waited_for = re.search(r"st\.shared|stmatrix|bar\.sync", ptx)
    return waited_for is not None and 0 < prefetched < asked_for < waited_for.start()


def registers_and_spills(cubin: bytes, *, in_loop: bool) -> tuple[int, int]:
    """Registers of a program's threads, and instructions that access local memory, where spilled registers go.

    Args:
        cubin: the compiled kernel.
        in_loop: count those of the shortest loop with matrix instructions alone.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", dump("--dump-resource-usage"))
        if stack == local == "0":
            return int(registers), 0  # no local memory, no spills; disassembling is slow
        sass = dump("-sass")
        return int(registers), len(re.findall(r"\b(?:STL|LDL)\b", shortest_loop(sass) if in_loop else sass))


def shortest_loop(sass: str) -> str:
    """The instructions between the target of a jump back and the jump, the fewest with matrix instructions in them."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = [(re.search(r"\bBRA\b.*(0x[0-9a-f]+)\s*$", text), at) for at, text in lines]
    ranges = [(int(jump[1], 16), at) for jump, at in jumps if jump and int(jump[1], 16) < at]
    bodies = ["\n".join(text for at, text in lines if first <= at <= last) for first, last in ranges]
    return min((body for body in bodies if "HGMMA" in body), key=len)


def main() -> None:
    """Compile in several processes and print one JSON line a configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(*c, arch) for arch in arguments.arch for c in configurations(arch)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for result in pool.map(compile_one, *zip(*jobs, strict=True)):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
