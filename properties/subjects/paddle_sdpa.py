"""PaddlePaddle's scaled_dot_product_attention, on the CPU: the composition of matrix products and a softmax."""

from __future__ import annotations

from typing import ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call

_DOCS = "https://www.paddlepaddle.org.cn/documentation/docs/en/api/paddle/nn/functional/scaled_dot_product_attention_en.html"


class Paddle(Adapter):
    """Heads after tokens, grouped heads, and a boolean mask."""

    name = "paddle"
    requires: ClassVar[dict[str, str]] = {"paddlepaddle": "paddle"}
    capabilities = Capabilities(
        # The CPU has no matrix product of the 16-bit formats.
        dtypes=("float32",),
        cache="none",
        overflow=False,
        lse=False,
        tiles=False,
        empty=False,
        blind=False,
        devices=("cpu",),
        policies={
            "causal alignment": Policy("top-left; masks are given by the caller", "observed"),
            "scale": Policy("1/sqrt(head_dim) if it is None", "documented", _DOCS, is_ours=True),
            "empty rows": Policy("NaN", "observed"),
            "NaN in unread memory": Policy("a masked value that is NaN makes its row NaN", "observed"),
            "bits across runs": Policy("the same on a CPU", "observed"),
        },
    )

    def run(self, call: Call) -> torch.Tensor:
        """Attend."""
        import paddle
        from paddle.nn.functional import scaled_dot_product_attention

        query, key, value = (
            paddle.to_tensor(tensor.transpose(1, 2).contiguous().numpy())
            for tensor in (call.query, call.keys, call.values)
        )
        mask = None if call.mask is None else paddle.to_tensor(call.mask.contiguous().numpy())
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scale)
        return torch.from_numpy(out.numpy()).transpose(1, 2)
