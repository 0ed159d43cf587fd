"""mlx.core.fast.scaled_dot_product_attention on the CPU."""

from __future__ import annotations

from typing import ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call

_DOCS = (
    "https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.fast.scaled_dot_product_attention.html"
)


class MlxAttention(Adapter):
    """On a CPU the composition of matrix products and a softmax in float32."""

    name = "mlx-cpu"
    requires: ClassVar[dict[str, str]] = {"mlx[cpu]": "mlx"}
    capabilities = Capabilities(
        cache="none",
        overflow=False,
        lse=False,
        tiles=False,
        blind=False,
        devices=("cpu",),
        policies={
            "causal alignment": Policy("bottom-right", "documented", _DOCS, is_ours=True),
            "scale": Policy("any number, no default", "documented", _DOCS, is_ours=True),
            "empty rows": Policy("the mean of all values; NaN with an additive mask of -inf", "observed"),
            "NaN in unread memory": Policy("a masked value that is NaN makes its row NaN", "observed"),
            "visible NaN": Policy("reaches what sees it", "observed"),
            "bits across runs": Policy("the same on a CPU", "observed"),
            "bits across batches": Policy("not promised", "undefined"),
            "bits across layouts": Policy("not promised", "undefined"),
        },
    )

    def run(self, call: Call) -> torch.Tensor:
        """Use its own causal mask where rows are alike, else a mask made for the call."""
        import mlx.core as mx
        import numpy as np

        dtype = getattr(mx, str(call.query.dtype).removeprefix("torch."))

        def array(tensor: torch.Tensor) -> mx.array:
            return mx.array(tensor.float().numpy()).astype(dtype)

        mask = None if call.mask is None else mx.array(call.mask.numpy())
        alike = set(call.new_lens) <= {call.q_len} and set(call.kv_lens) <= {call.keys.shape[2]}
        if call.is_causal and alike:
            mask = "causal"
        with mx.stream(mx.cpu):
            out = mx.fast.scaled_dot_product_attention(
                array(call.query), array(call.keys), array(call.values), scale=call.scale, mask=mask
            )
            return torch.tensor(np.array(out.astype(mx.float32))).to(call.query.dtype)
