"""FlashInfer on a cache in pages, called as a server does: one wrapper for decoding, one for prompts and chunks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call, Result
from properties.subjects.packing import PAGE, ends, packed, paged, unpacked
from references.arithmetic_model import PERMISSIVE, ArithmeticModel

_DOCS = "https://docs.flashinfer.ai/api/attention.html"
WORKSPACE = 128 << 20
"""Bytes that its documentation recommends."""


class FlashInfer(Adapter):
    """The kernels for any GPU ("fa2"); each dtype and head_dim is a module that is compiled by nvcc once."""

    name = "flashinfer"
    requires: ClassVar[dict[str, str]] = {"flashinfer-python": "flashinfer"}
    capabilities = Capabilities(
        dtypes=("float16", "bfloat16"),
        head_dims=(64, 128),
        groups=(1, 2, 3, 4, 6, 8, 16),  # Of the kernel for decoding.
        cache="none",
        overflow=False,
        tiles=False,
        empty=False,
        blind=False,
        devices=("cuda",),
        policies={
            "causal alignment": Policy("bottom-right", "documented", _DOCS, is_ours=True),
            "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
            "empty rows": Policy("0", "observed"),
            "NaN in unread memory": Policy("in a hidden value it reaches the output, in a hidden key not", "observed"),
            "visible NaN": Policy("reaches its element of what sees it", "observed"),
            "bits across batches": Policy("may differ, unless fixed_split_size is given", "documented", _DOCS),
        },
    )

    def model(self, device: str) -> ArithmeticModel:
        """What both kernels share, by the headers in ``flashinfer/data/include/flashinfer`` of 0.7.4.

        Decoding keeps logits, weights and their sums in float32 (compute_qk, update_local_state of
        attention/decode.cuh). For prompts weights are rounded to nearest in the input's format, and the row sum adds
        them so (compute_sfm_v of attention/prefill.cuh, vec_dtypes.cuh). Rows are split from 9 pages on, if the GPU has
        room; a part's output is stored in the output's format, which is the input's (``params.o = tmp_v`` in both),
        beside its log-sum-exp, and so is that of each group in which parts are merged (threadblock_sync_state of
        attention/cascade.cuh).
        """
        del device
        return replace(
            PERMISSIVE,
            name="FlashInfer",
            p_rounding="nearest",
            row_sum_from_p=True,
            merge="lse twice",
            partial_format=None,
        )

    @cached_property
    def decode(self) -> Any:
        """For one query a row."""
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        return BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")

    @cached_property
    def prefill(self) -> Any:
        """For any number of queries a row."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        return BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")

    def run(self, call: Call) -> Result:
        """Plan and run."""
        pages = paged(call.keys, call.values, call.kv_lens)
        dtype, device = call.query.dtype, call.query.device
        cache = (
            ends(pages.counts, device),
            torch.tensor(pages.table, dtype=torch.int32, device=device),
            torch.tensor(pages.last, dtype=torch.int32, device=device),
        )
        sizes = (call.query.shape[1], call.new_keys.shape[1], call.query.shape[3], PAGE)
        options = {"sm_scale": call.scale, "q_data_type": dtype, "kv_data_type": dtype}
        if call.q_len == 1:
            wrapper, queries = self.decode, (1,) * len(call.query)
            wrapper.plan(*cache, *sizes, **options)
        else:
            wrapper, queries = self.prefill, call.query_lens
            wrapper.plan(ends(queries, device), *cache, *sizes, causal=call.is_causal, **options)
        out, lse = wrapper.run(packed(call.query, queries), (pages.keys, pages.values), return_lse=True)
        # The logarithm is to the base 2.
        return Result(unpacked(out, queries, call.q_len), unpacked(lse, queries, call.q_len) * math.log(2))


def _workspace() -> torch.Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
