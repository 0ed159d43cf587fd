"""The operator Attention of ONNX, opset 24: in ONNX Runtime, and in the reference of the onnx package."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call, Result
from properties.subjects.onnx_nodes import Inputs, Session, model

_DOCS = "https://onnx.ai/onnx/operators/onnx__Attention.html"

CAPABILITIES = Capabilities(
    # In float16 the operator rounds scores to float16, which the error budget does not provide for.
    dtypes=("float32",),
    scales="positive",
    cache="none",
    overflow=False,
    lse=False,
    tiles=False,
    empty=False,
    blind=False,
    devices=("cpu",),
    policies={
        "causal alignment": Policy("query i sees key j iff j <= i + offset", "documented", _DOCS, is_ours=True),
        "scale": Policy("1/sqrt(head_size) by default; Q and K are multiplied by its root", "documented", _DOCS),
        "empty rows": Policy("0, since the errata of onnx 1.23", "documented", _DOCS, is_ours=True),
        "NaN in unread memory": Policy("NaN in padding of V makes its rows NaN", "observed"),
        "visible NaN": Policy("reaches what sees it", "observed"),
        "bits across runs": Policy("the same on a CPU", "observed"),
    },
)


class OnnxRuntimeAttention(Adapter):
    """ONNX Runtime's CPU kernel, with the cache outside: ``nonpad_kv_seqlen`` says where each row ends."""

    name = "onnxruntime-attention"
    requires: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime", "onnx": "onnx"}
    capabilities = CAPABILITIES

    @cached_property
    def session(self) -> Session:
        """Of this operator."""
        return Session("Attention")

    def run(self, call: Call) -> torch.Tensor | Result:
        """Ask for its own causal mask where it means ours, else give a mask made for the call."""
        is_theirs = set(call.new_lens) <= {call.q_len} and (call.has_cache or not call.is_causal)
        mask = None if is_theirs or call.mask is None else call.mask.numpy()
        inputs: Inputs = {
            "Q": call.query.numpy(),
            "K": call.keys.numpy(),
            "V": call.values.numpy(),
            "attn_mask": mask,
            "past_key": None,
            "past_value": None,
            "nonpad_kv_seqlen": np.array(call.kv_lens, np.int64),
        }
        return torch.from_numpy(self.evaluate(inputs, is_causal=int(call.is_causal and is_theirs), scale=call.scale))

    def evaluate(self, inputs: Inputs, **attributes: Any) -> NDArray[Any]:
        """One node."""
        return self.session.run(inputs, ["Y"], **attributes)[0]


class OnnxRuntimePast(OnnxRuntimeAttention):
    """The same with the cache inside: it takes ``past_key`` and ``past_value``, and returns the two ``present_``."""

    name = "onnxruntime-past"
    # All rows have one past, and nonpad_kv_seqlen must not be given beside it.
    capabilities = replace(
        CAPABILITIES, ops=("attention_with_kv_cache",), cache="functional", ragged=False, padding=False
    )

    def run(self, call: Call) -> Result:
        """Append to the past, without one on a first call, under its own causal mask."""
        length = call.seq_lens[0]
        past = [buffer[:, :, :length].numpy() for buffer in call.buffers] if call.buffers and length else [None, None]
        inputs: Inputs = {
            "Q": call.query.numpy(),
            "K": call.new_keys.numpy(),
            "V": call.new_values.numpy(),
            "attn_mask": None,
            "past_key": past[0],
            "past_value": past[1],
        }
        outputs = ["Y", "present_key", "present_value"]
        attributes = {"is_causal": int(call.is_causal), "scale": call.scale}
        out, keys, values = map(torch.from_numpy, self.session.run(inputs, outputs, **attributes))
        return Result(out, buffers=(keys, values))


class OnnxReference(OnnxRuntimeAttention):
    """The executable specification: NumPy, in the precision of the inputs."""

    name = "onnx-reference"
    requires: ClassVar[dict[str, str]] = {"onnx": "onnx"}

    def evaluate(self, inputs: Inputs, **attributes: Any) -> NDArray[Any]:
        """One node."""
        from onnx.reference import ReferenceEvaluator

        made = ReferenceEvaluator(model("Attention", "", 24, inputs, ["Y"], **attributes))
        result: NDArray[Any] = made.run(None, {name: array for name, array in inputs.items() if array is not None})[0]
        return result
