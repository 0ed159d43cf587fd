"""jax.nn.dot_product_attention, one implementation at a time."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import ClassVar

import torch

from properties.capabilities import Capabilities, NotOffered, Policy
from properties.subjects.adapter import Adapter, Call

_DOCS = "https://docs.jax.dev/en/latest/_autosummary/jax.nn.dot_product_attention.html"


class JaxAttention(Adapter):
    """Compiled for each shape, so cases are small."""

    name = "jax-xla"
    implementation: ClassVar[str] = "xla"
    requires: ClassVar[dict[str, str]] = {"jax": "jax"}
    slow = True
    capabilities = Capabilities(
        cache="none",
        overflow=False,
        lse=False,  # It returns one, in the dtype of the keys.
        tiles=False,
        blind=False,
        devices=("cpu",),
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
        import jax
        import jax.numpy as jnp
        import numpy as np

        dtype = jnp.dtype(str(call.query.dtype).removeprefix("torch."))

        def array(tensor: torch.Tensor) -> jax.Array:
            return jnp.asarray(tensor.transpose(1, 2).float().cpu().numpy()).astype(dtype)

        is_causal = call.is_causal and call.is_square
        mask = None if is_causal or call.mask is None else jnp.asarray(call.mask.cpu().numpy())
        attend = jax.nn.dot_product_attention
        # Compiled as a whole, 16-bit products raise on a CPU: float16 in 0.12.0.1, bfloat16 of one token in 0.10.2.
        if call.query.dtype == torch.float32:
            attend = jax.jit(attend, static_argnames=("is_causal", "scale", "implementation"))
        out = attend(
            array(call.query),
            array(call.keys),
            array(call.values),
            mask=mask,
            is_causal=is_causal,
            scale=call.scale,
            implementation=self.implementation,
        )
        return torch.tensor(np.asarray(out.astype(jnp.float32))).transpose(1, 2).to(call.query)


class JaxCudnn(JaxAttention):
    """The graphs of cuDNN. What they do not take raises, as documented."""

    name = "jax-cudnn"
    implementation = "cudnn"
    capabilities = replace(
        JaxAttention.capabilities,
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 257, 8),
        empty=False,
        devices=("cuda",),
        policies={
            "causal alignment": Policy("not said; masks are given by the caller", "undefined"),
            "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
        },
    )

    def __init__(self) -> None:
        """Leave memory to PyTorch; call it, so that a missing cuDNN is no verdict on every law."""
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        import jax.numpy as jnp

        token = jnp.ones((1, 2, 1, 64), jnp.bfloat16)
        jax.nn.dot_product_attention(token, token, token, implementation="cudnn")

    def run(self, call: Call) -> torch.Tensor:
        """Do as the other implementation.

        Raises:
            NotOffered: cuDNN does not take such inputs.
        """
        import jax

        try:
            return super().run(call)
        except NotImplementedError as error:
            raise NotOffered("what cuDNN does not take") from error
        except jax.errors.JaxRuntimeError as error:
            if "cudnn" in str(error).lower() and "EXECUTION_FAILED" not in str(error):
                raise NotOffered("what cuDNN does not take") from error
            raise
