"""torch.nn.attention.varlen.varlen_attn: rows of any lengths, packed one after the other."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch

from properties.capabilities import Policy
from properties.subjects.adapter import Adapter, Call, Result
from properties.subjects.torch_sdpa import CAPABILITIES

_DOCS = "https://docs.pytorch.org/docs/stable/nn.attention.varlen.html"


class Varlen(Adapter):
    """FlashAttention. The groups of query heads came in a later release than the windows, and are left out."""

    name = "torch-varlen"
    capabilities = replace(
        CAPABILITIES,
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 257, 8),
        groups=(1,),
        lse=True,
        empty=False,
        devices=("cuda",),
        policies={
            # The document has a word for it, "causal", and no alignment; FlashAttention's is the lower right.
            "causal alignment": Policy("bottom-right", "observed", is_ours=True),
            "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
        },
    )

    def run(self, call: Call) -> Result:
        """Pack the real tokens, attend, and unpack."""
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        queries = call.new_lens if call.has_cache else (call.q_len,) * call.query.shape[0]
        out, lse = varlen_attn(
            _packed(call.query, queries),
            _packed(call.keys, call.kv_lens),
            _packed(call.values, call.kv_lens),
            _ends(queries, call.query.device),
            _ends(call.kv_lens, call.query.device),
            max(queries),
            max(call.kv_lens),
            return_aux=AuxRequest(lse=True),
            scale=call.scale,
            window_size=(-1, 0) if call.is_causal else (-1, -1),
        )
        # Documented as [tokens, heads], it is [heads, tokens].
        unpacked = call.query.new_zeros(call.query.shape)
        unpacked_lse = lse.new_zeros(call.query.shape[:3])
        for b, (one, its_lse) in enumerate(zip(out.split(queries), lse.split(queries, dim=1), strict=True)):
            unpacked[b, :, : len(one)] = one.transpose(0, 1)
            unpacked_lse[b, :, : len(one)] = its_lse
        return Result(unpacked, unpacked_lse)


def _packed(tensor: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """[tokens of all rows, heads, head_dim]"""
    return torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(tensor, lengths, strict=True)])


def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
