"""What the kernels for Hopper are launched with: descriptors of keys and values for the tensor memory accelerator.

Imported when it is first needed: it needs Gluon, which not every Triton has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashcore.fast import tuning
from flashcore.fast.kernels.prefill_sm90 import ROWS, prefill_attention_sm90

REGISTERS = 240
"""Of a thread of the second consumer."""

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def launch(programs: int, plan: tuning.LaunchPlan, keys_and_values: tuple[Tensor, ...], arguments: Any) -> None:
    """Run ``prefill_attention_sm90`` with ``arguments`` and descriptors of cached and new keys and values."""
    query = arguments[4]
    descriptors = [describe(t, query, plan) for t in keys_and_values]
    prefill_attention_sm90[(programs,)](*arguments, *descriptors, **constants(plan), **plan.compiler_options())


def constants(plan: tuning.LaunchPlan) -> dict[str, int | bool]:
    """The constexprs of the kernel."""
    return {
        "CONSUMERS": plan.block_m // ROWS.value, "BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d,
        "STAGES": plan.num_stages, "REGISTERS": REGISTERS,
        "IN_REGISTERS": tuning.SM90_TILES[plan.block_d][plan.block_m].query_in_registers,
    }  # fmt: skip


def layout(dtype: torch.dtype, plan: tuning.LaunchPlan) -> Any:
    """How a tile of keys or values lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, plan.block_n, plan.block_d], DTYPES[dtype])


def describe(tensor: Tensor, query: Tensor, plan: tuning.LaunchPlan) -> TensorDescriptor:
    """Descriptor of tiles [1, 1, block_n, head_dim] of a [batch, num_kv_heads, tokens, head_dim] tensor.

    An empty tensor has none and is never copied from: the query stands in for it.
    """
    tensor = tensor if tensor.numel() > 0 else query
    block = [1, 1, plan.block_n, plan.block_d]
    # A dimension of one element may have any stride, but the engine wants whole 16 bytes.
    strides = [s if size > 1 else plan.block_d for s, size in zip(tensor.stride(), tensor.shape, strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:3], 1], block, layout(tensor.dtype, plan))


def split_constants(plan: tuning.LaunchPlan) -> dict[str, int]:
    """The constexprs of the kernel of decode steps."""
    return {
        "BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "HEADS": plan.block_m, "MERGE_M": plan.merge_m,
        "STAGES": plan.num_stages,
    }  # fmt: skip
