"""keras.ops.dot_product_attention on the torch backend."""

from __future__ import annotations

import os
from typing import ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call

_DOCS = "https://keras.io/api/ops/nn/#dot_product_attention-function"


class KerasAttention(Adapter):
    """Masks become large negative biases of PyTorch's scaled_dot_product_attention."""

    name = "keras-torch"
    requires: ClassVar[dict[str, str]] = {"keras": "keras"}
    capabilities = Capabilities(
        cache="none",
        overflow=False,
        lse=False,
        tiles=False,
        blind=False,
        policies={
            "causal alignment": Policy("top-left; masks are given by the caller", "observed"),
            "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
            "empty rows": Policy("the mean of all values, masked ones too", "observed"),
            "NaN in unread memory": Policy("a masked value that is NaN makes its row NaN", "observed"),
            "visible NaN": Policy("reaches what sees it", "observed"),
            "bits across runs": Policy("the same on a CPU", "observed"),
            "bits across batches": Policy("not promised", "undefined"),
            "bits across layouts": Policy("not promised", "undefined"),
        },
    )

    def run(self, call: Call) -> torch.Tensor:
        """Use its own causal mask where all alignments agree, else a mask made for the call."""
        os.environ.setdefault("KERAS_BACKEND", "torch")
        import keras

        is_causal = call.is_causal and call.is_square
        query, keys, values = (each.transpose(1, 2) for each in (call.query, call.keys, call.values))
        mask = None if is_causal else call.mask
        out: torch.Tensor = keras.ops.dot_product_attention(
            query, keys, values, mask=mask, scale=call.scale, is_causal=is_causal
        )
        return out.transpose(1, 2)
