"""xformers' memory_efficient_attention by its split-K kernel in Triton, made for decoding."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from properties.capabilities import Capabilities, NotOffered, Policy
from properties.subjects import SubjectError
from properties.subjects.adapter import Adapter, Call, Result

_DOCS = "https://facebookresearch.github.io/xformers/components/ops.html"
MAX_CAUSAL_QUERIES = 16
"""Of a row: it refuses more."""


class SplitK(Adapter):
    """Query heads are given in groups of a kv head, which the kernel then reads once; every length is compiled."""

    name = "xformers-splitk"
    requires: ClassVar[dict[str, str]] = {"xformers": "xformers"}
    slow = True
    capabilities = Capabilities(
        dtypes=("float16", "bfloat16"),
        head_dims=(16, 32, 64, 128, 256),
        padding=False,
        cache="none",
        overflow=False,
        tiles=False,
        # It asks for elements of a head that are adjacent, and for vectors of 8.
        layouts=("contiguous", "transposed", "expanded_heads"),
        empty=False,
        blind=False,
        devices=("cuda",),
        policies={
            "causal alignment": Policy(
                "bottom-right, by BlockDiagonalCausalWithOffsetPaddedKeysMask", "documented", _DOCS, is_ours=True
            ),
            "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
            "empty rows": Policy("0", "observed"),
            "NaN in unread memory": Policy("in a hidden value it reaches the output, in a hidden key not", "observed"),
            "visible NaN": Policy("reaches its element of what sees it", "observed"),
        },
    )

    def __init__(self) -> None:
        """See whether xformers is whole.

        Raises:
            SubjectError: its extension does not load, without which it refuses every call on a GPU, kernels in Triton
                included.
        """
        import xformers

        if not xformers._has_cpp_library:
            raise SubjectError("its extension was built for another PyTorch or CUDA: python -m xformers.info")

    def run(self, call: Call) -> Result:
        """Without a mask where all rows are alike, else as blocks of keys of one length, used up to another.

        Raises:
            NotOffered: a causal call of too many queries.
        """
        from xformers.ops import fmha

        if call.is_causal and call.q_len > MAX_CAUSAL_QUERIES:
            raise NotOffered(f"causal calls of more than {MAX_CAUSAL_QUERIES} queries")
        batch, num_q_heads, q_len, head_dim = call.query.shape
        query = _grouped(call.query, call.group_size)
        keys, values = (_shared(tensor, call.group_size) for tensor in (call.keys, call.values))
        bias = None
        if call.has_cache or call.is_causal:
            masks: Any = fmha.attn_bias
            mask = masks.BlockDiagonalPaddedKeysMask
            if call.is_causal:
                mask = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask
            bias = mask.from_seqlens([q_len] * batch, keys.shape[1], call.kv_lens, device=call.query.device)
            query, keys, values = (x.flatten(0, 1)[None] for x in (query, keys, values))
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            query, keys, values, bias, scale=call.scale, op=fmha.triton_splitk.FwOp
        )
        # [rows, kv heads, group, queries], or [1, kv heads, group, queries of all rows].
        by_head = lse.flatten(1, 2).reshape(len(lse), num_q_heads, -1, q_len).transpose(1, 2)
        return Result(
            out.reshape(batch, q_len, num_q_heads, head_dim).transpose(1, 2),
            by_head.reshape(batch, num_q_heads, q_len),
        )


def _grouped(query: torch.Tensor, group_size: int) -> torch.Tensor:
    """[rows, queries, kv heads, group, head_dim]"""
    batch, num_q_heads, q_len, head_dim = query.shape
    return query.view(batch, num_q_heads // group_size, group_size, q_len, head_dim).permute(0, 3, 1, 2, 4)


def _shared(tensor: torch.Tensor, group_size: int) -> torch.Tensor:
    """[rows, keys, kv heads, group, head_dim], one place for a group."""
    return tensor.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, group_size, -1)
