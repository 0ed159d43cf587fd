"""FlagGems' flash_attn_varlen_func, in Triton: rows of any lengths, packed or in pages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call, Result
from properties.subjects.packing import ends, packed, paged, unpacked

_DOCS = "https://github.com/flagos-ai/FlagGems/blob/v5.0.2/src/flag_gems/ops/attention.py"


class Varlen(Adapter):
    """Keys and values packed as a prompt's are; a scale is compiled in."""

    name = "flag-gems-varlen"
    requires: ClassVar[dict[str, str]] = {"flag-gems": "flag_gems"}
    slow = True
    capabilities = Capabilities(
        dtypes=("float16", "bfloat16"),
        head_dims=range(16, 257, 8),  # 8, which its assertion lets pass, does not compile: tl.dot takes 16 and more.
        cache="none",
        overflow=False,
        tiles=False,
        empty=False,
        blind=False,
        devices=("cuda",),
        policies={
            "causal alignment": Policy("bottom-right", "documented", _DOCS, is_ours=True),
            "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
            "empty rows": Policy("output 0; of the log-sum-exp nothing is said", "documented", _DOCS),
            "NaN in unread memory": Policy("in a hidden value it reaches the output, in a hidden key not", "observed"),
            "visible NaN": Policy("reaches its element of what sees it", "observed"),
            "bits across runs": Policy("the forward pass is always deterministic", "documented", _DOCS, is_ours=True),
        },
    )

    def run(self, call: Call) -> Result:
        """Pack the real tokens, attend, and unpack."""
        from flag_gems import flash_attn_varlen_func

        queries = call.query_lens
        out, lse = flash_attn_varlen_func(
            packed(call.query, queries),
            max_seqlen_q=max(queries),
            cu_seqlens_q=ends(queries, call.query.device),
            max_seqlen_k=max(call.kv_lens),
            softmax_scale=call.scale,
            causal=call.is_causal,
            return_softmax_lse=True,
            **self.keys(call),
        )
        return Result(unpacked(out, queries, call.q_len), unpacked(lse.T, queries, call.q_len))

    def keys(self, call: Call) -> dict[str, Any]:
        """Its arguments for keys and values."""
        return {
            "k": packed(call.keys, call.kv_lens),
            "v": packed(call.values, call.kv_lens),
            "cu_seqlens_k": ends(call.kv_lens, call.query.device),
        }


class Paged(Varlen):
    """Keys and values in pages, as a server's cache has them."""

    name = "flag-gems-paged"

    def keys(self, call: Call) -> dict[str, Any]:
        """Its arguments for keys and values."""
        pages = paged(call.keys, call.values, call.kv_lens)
        rows = torch.split(torch.tensor(pages.table, dtype=torch.int32), list(pages.counts))
        table = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        return {
            "k": pages.keys,
            "v": pages.values,
            "seqused_k": torch.tensor(call.kv_lens, dtype=torch.int32, device=call.query.device),
            "block_table": table.to(call.query.device),
        }
