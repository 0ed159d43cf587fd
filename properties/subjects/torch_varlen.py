"""torch.nn.attention.varlen.varlen_attn: rows of any lengths, packed one after the other."""

from __future__ import annotations

from dataclasses import replace

from properties.capabilities import Policy
from properties.subjects.adapter import Adapter, Call, Result
from properties.subjects.packing import ends, packed, unpacked
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

        queries, device = call.query_lens, call.query.device
        out, lse = varlen_attn(
            packed(call.query, queries),
            packed(call.keys, call.kv_lens),
            packed(call.values, call.kv_lens),
            ends(queries, device),
            ends(call.kv_lens, device),
            max(queries),
            max(call.kv_lens),
            return_aux=AuxRequest(lse=True),
            scale=call.scale,
            window_size=(-1, 0) if call.is_causal else (-1, -1),
        )
        # Documented as [tokens, heads], it is [heads, tokens].
        return Result(unpacked(out, queries, call.q_len), unpacked(lse.T, queries, call.q_len))
