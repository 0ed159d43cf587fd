"""PyTorch's scaled_dot_product_attention, one backend at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from properties.capabilities import Capabilities, NotOffered, Policy, Topic
from properties.subjects.adapter import Adapter, Call
from references.arithmetic_model import PERMISSIVE, ArithmeticModel

_DOCS = "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"
_BIAS = "https://docs.pytorch.org/docs/stable/nn.attention.bias.html"
_ACCURACY = "https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html"

_DOCUMENTED: dict[Topic, Policy] = {
    "causal alignment": Policy("top-left; masks are given by the caller", "documented", _DOCS),
    "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
    "bits across batches": Policy("may depend on the rest of the batch", "documented", _ACCURACY),
}
CAPABILITIES = Capabilities(
    cache="none",
    overflow=False,
    lse=False,
    tiles=False,
    blind=False,
    policies={
        **_DOCUMENTED,
        "empty rows": Policy("0 (2.13, CPU, math and flash)", "observed"),
        "NaN in unread memory": Policy("a NaN in a masked key or value reaches the output (2.13, CPU)", "observed"),
    },
)
# Kernels for CUDA alone. They ask for elements of a head that are adjacent, most for vectors of 8; what else they do
# not take, the documents leave to a warning.
_CUDA = replace(
    CAPABILITIES,
    dtypes=("float16", "bfloat16"),
    head_dims=range(8, 257, 8),
    layouts=("contiguous", "transposed", "padded", "expanded_heads"),
    devices=("cuda",),
    policies=_DOCUMENTED,
)
# What PyTorch says when none of the backends that it may use takes the inputs.
_REFUSALS = ("No available kernel", "No viable backend")
# A float32 product is made of several in tfloat32: more accurate than one, which is what the budget allows.
_EFFICIENT = replace(PERMISSIVE, name="SDPA efficient", tf32=True)


class Backend(Adapter):
    """The function, with the backends of a list."""

    backends: ClassVar[tuple[SDPBackend, ...]]

    def run(self, call: Call) -> torch.Tensor:
        """Use its own causal mask where all alignments agree, else a mask made for the call.

        Raises:
            NotOffered: the backend does not take such inputs; the documents say that it may not.
        """
        is_causal = call.is_causal and call.is_square
        try:
            with sdpa_kernel(list(self.backends)):
                return scaled_dot_product_attention(
                    call.query,
                    call.keys,
                    call.values,
                    attn_mask=None if is_causal else self.mask(call),
                    is_causal=is_causal,
                    scale=call.scale,
                    enable_gqa=call.group_size > 1,
                )
        except RuntimeError as error:
            if any(words in str(error) for words in _REFUSALS):
                raise NotOffered("what this backend does not take") from error
            raise

    def mask(self, call: Call) -> torch.Tensor | None:
        """What a query may see."""
        return call.mask


class TorchSDPA(Backend):
    """The backend that PyTorch chooses."""

    name = "torch-sdpa"
    capabilities = CAPABILITIES
    backends = tuple(SDPBackend.__members__.values())

    def model(self, device: str) -> ArithmeticModel:
        """On CUDA it may be any backend's."""
        return PERMISSIVE if device == "cpu" else replace(_EFFICIENT, name="SDPA", scale_into_query=True)


class Math(Backend):
    """The composition of matrix products and a softmax that all devices have."""

    name = "torch-sdpa-math"
    capabilities = CAPABILITIES
    backends = (SDPBackend.MATH,)

    def model(self, device: str) -> ArithmeticModel:
        """Query and key are each multiplied by the square root of the scale."""
        del device
        return replace(PERMISSIVE, name="SDPA math", scale_into_query=True)


class Flash(Backend):
    """The tiled kernel of a CPU."""

    name = "torch-sdpa-flash"
    # It asks for elements of a head that are adjacent.
    capabilities = replace(CAPABILITIES, layouts=("contiguous", "transposed", "expanded_heads"), devices=("cpu",))
    backends = (SDPBackend.FLASH_ATTENTION,)


class FlashCuda(Backend):
    """FlashAttention. It takes no masks, so rows are alike and causal calls on a cache use ``causal_lower_right``."""

    name = "torch-sdpa-flash-cuda"
    capabilities = replace(
        _CUDA,
        head_dims=CAPABILITIES.head_dims,
        ragged=False,
        padding=False,
        policies={
            **_DOCUMENTED,
            "causal alignment": Policy("bottom-right, by causal_lower_right", "documented", _BIAS, is_ours=True),
        },
    )
    backends = (SDPBackend.FLASH_ATTENTION,)

    def mask(self, call: Call) -> torch.Tensor | None:
        """The lower right triangle, by name."""
        return causal_lower_right(call.q_len, call.keys.shape[2]) if call.is_causal else None


class Efficient(Backend):
    """Memory-efficient attention. Groups are documented for other backends alone."""

    name = "torch-sdpa-efficient"
    capabilities = replace(_CUDA, dtypes=CAPABILITIES.dtypes, groups=(1,))
    backends = (SDPBackend.EFFICIENT_ATTENTION,)

    def model(self, device: str) -> ArithmeticModel:
        """As far as is known."""
        del device
        return _EFFICIENT


class Cudnn(Backend):
    """The graphs of cuDNN."""

    name = "torch-sdpa-cudnn"
    capabilities = replace(
        _CUDA,
        policies={
            **_DOCUMENTED,
            "bits across runs": Policy("may differ, unless torch.backends.cudnn.deterministic", "documented", _DOCS),
        },
    )
    backends = (SDPBackend.CUDNN_ATTENTION,)
