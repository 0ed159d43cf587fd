"""PyTorch's scaled_dot_product_attention, one backend at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call
from references.arithmetic_model import PERMISSIVE, ArithmeticModel

_DOCS = "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"
_BACKENDS = "https://docs.pytorch.org/docs/stable/generated/torch.nn.attention.sdpa_kernel.html"

CAPABILITIES = Capabilities(
    cache="none",
    overflow=False,
    lse=False,
    tiles=False,
    blind=False,
    policies={
        "causal alignment": Policy("top-left; masks are given by the caller", "documented", _DOCS),
        "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
        "empty rows": Policy("0 (2.13, CPU, math and flash)", "observed"),
        "NaN in unread memory": Policy("a NaN in a masked key or value reaches the output (2.13, CPU)", "observed"),
    },
)


class TorchSDPA(Adapter):
    """The function, with the backend that PyTorch chooses."""

    name = "torch-sdpa"
    capabilities = CAPABILITIES
    backend: ClassVar[SDPBackend | None] = None

    def run(self, call: Call) -> torch.Tensor:
        """Use its own causal mask where all alignments agree, else a mask made for the call."""
        with sdpa_kernel([self.backend] if self.backend else list(SDPBackend.__members__.values())):
            is_causal = call.is_causal and call.is_square
            return scaled_dot_product_attention(
                call.query,
                call.keys,
                call.values,
                attn_mask=None if is_causal else call.mask,
                is_causal=is_causal,
                scale=call.scale,
                enable_gqa=call.group_size > 1,
            )


class Math(TorchSDPA):
    """The composition of matrix products and a softmax that all devices have."""

    name = "torch-sdpa-math"
    backend = SDPBackend.MATH

    def model(self, device: str) -> ArithmeticModel:
        """Query and key are each multiplied by the square root of the scale."""
        del device
        return replace(PERMISSIVE, name="SDPA math", scale_into_query=True)


class Flash(TorchSDPA):
    """The tiled kernel; on a CPU its own, on CUDA FlashAttention 2."""

    name = "torch-sdpa-flash"
    # It asks for elements of a head that are adjacent.
    capabilities = replace(CAPABILITIES, layouts=("contiguous", "transposed", "expanded_heads"))
    backend = SDPBackend.FLASH_ATTENTION
