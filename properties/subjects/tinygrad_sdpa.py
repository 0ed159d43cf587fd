"""tinygrad's Tensor.scaled_dot_product_attention; set DEV to CPU (needs clang), CPU:LLVM or CPU:X86."""

from __future__ import annotations

from typing import ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call

_DOCS = "https://docs.tinygrad.org/tensor/ops/#tinygrad.Tensor.scaled_dot_product_attention"


class Tinygrad(Adapter):
    """Grouped heads and a boolean mask; a kernel is compiled for each shape.

    Only in float32: it rounds 16-bit scores to 16 bits, and for that no error budget is derived.
    """

    name = "tinygrad"
    requires: ClassVar[dict[str, str]] = {"tinygrad": "tinygrad"}
    slow = True
    capabilities = Capabilities(
        dtypes=("float32",),
        scales="default",
        cache="none",
        overflow=False,
        lse=False,
        tiles=False,
        empty=False,
        blind=False,
        devices=("cpu",),
        policies={
            "causal alignment": Policy("top-left; masks are given by the caller", "observed"),
            "scale": Policy("always 1/sqrt(head_dim), as in the cited paper", "documented", _DOCS),
            "empty rows": Policy("NaN", "observed"),
            "NaN in unread memory": Policy("a masked value that is NaN makes its row NaN", "observed"),
            "bits across runs": Policy("the same on a CPU", "observed"),
        },
    )

    def __init__(self) -> None:
        """Compile something, so that a compiler that is missing is no verdict on every law."""
        from tinygrad import Tensor

        (Tensor([1.0]) + 1).realize()

    def run(self, call: Call) -> torch.Tensor:
        """Attend."""
        from tinygrad import Tensor

        query, key, value = (Tensor(tensor.contiguous().numpy()) for tensor in (call.query, call.keys, call.values))
        mask = None if call.mask is None else Tensor(call.mask.contiguous().numpy())
        out = query.scaled_dot_product_attention(key, value, attn_mask=mask, enable_gqa=call.group_size > 1)
        return torch.from_numpy(out.numpy())
