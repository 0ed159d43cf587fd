"""OpenVINO's operation ScaledDotProductAttention-13, on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call

_DOCS = (
    "https://docs.openvino.ai/2025/documentation/openvino-ir-format/operation-sets/operation-specs/sequence/"
    "scaled-dot-product-attention.html"
)


class OpenVINO(Adapter):
    """The operation in float32, with open sizes, heads repeated and a boolean mask."""

    name = "openvino"
    requires: ClassVar[dict[str, str]] = {"openvino": "openvino"}
    capabilities = Capabilities(
        dtypes=("float32",),
        cache="none",
        overflow=False,
        lse=False,
        tiles=False,
        empty=False,
        blind=False,
        devices=("cpu",),
        policies={
            "causal alignment": Policy("top-left; masks are given by the caller", "documented", _DOCS),
            "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
            "empty rows": Policy("NaN, by the pseudo-code", "documented", _DOCS),
            "NaN in unread memory": Policy("NaN spreads, by the pseudo-code", "documented", _DOCS),
            "bits across runs": Policy("the same on a CPU", "observed"),
        },
    )

    @staticmethod
    @cache
    def compiled(is_masked: bool) -> Any:
        """The model with or without a mask; inputs query, key, value, scale, mask."""
        import openvino
        import openvino.opset13 as ops

        inputs = [ops.parameter([-1, -1, -1, -1], np.float32) for _ in range(3)]
        scale = ops.parameter([], np.float32)
        mask = ops.parameter([-1, 1, -1, -1], np.bool_) if is_masked else ops.constant(np.zeros((), np.float32))
        node = ops.scaled_dot_product_attention(*inputs, attention_mask=mask, scale=scale)
        model = openvino.Model([node], [*inputs, scale, mask] if is_masked else [*inputs, scale], "attention")
        return openvino.Core().compile_model(
            model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        )

    def run(self, call: Call) -> torch.Tensor:
        """Attend."""
        tensors = call.query, call.repeated(call.keys), call.repeated(call.values)
        arrays = [tensor.contiguous().numpy() for tensor in tensors] + [np.array(call.scale, np.float32)]
        if call.mask is not None:
            arrays.append(call.mask.contiguous().numpy())
        results = self.compiled(call.mask is not None)(arrays)
        return torch.from_numpy(np.array(next(iter(results.values()))))
