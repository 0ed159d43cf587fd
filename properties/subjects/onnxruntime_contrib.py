"""ONNX Runtime's own operators GroupQueryAttention and MultiHeadAttention, on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call, Result
from properties.subjects.onnx_nodes import Inputs, Session

_DOCS = "https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft."

_MHA = Capabilities(
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
        "causal alignment": Policy("top-left; masks are given by the caller", "observed"),
        "scale": Policy("1/sqrt(head_size) by default", "documented", _DOCS + "MultiHeadAttention", is_ours=True),
        "empty rows": Policy("NaN under attention_bias, the mean of all under key_padding_mask", "observed"),
        "NaN in unread memory": Policy("a masked value that is NaN makes its row NaN", "observed"),
        "bits across runs": Policy("the same on a CPU", "observed"),
    },
)
_GQA = replace(
    _MHA,
    ops=("attention_with_kv_cache",),
    dtypes=("float16", "float32"),
    head_dims=range(8, 257, 8),
    masks=(True,),
    cache="functional",
    policies={
        "causal alignment": Policy(
            "query s of a row stands at P + s", "documented", _DOCS + "GroupQueryAttention", is_ours=True
        ),
        "scale": Policy("1/sqrt(head_size) by default", "documented", _DOCS + "GroupQueryAttention", is_ours=True),
        "empty rows": Policy("0", "observed"),
        "NaN in unread memory": Policy("slots behind the length and padding are not read", "observed"),
        "visible NaN": Policy("a hidden future value that is NaN makes its row NaN", "observed"),
        "bits across runs": Policy("the same on a CPU", "observed"),
    },
)


class OnnxRuntimeMHA(Adapter):
    """MultiHeadAttention; the mask as ``attention_bias``, heads repeated."""

    name = "onnxruntime-mha"
    requires: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime", "onnx": "onnx"}
    capabilities = _MHA

    @cached_property
    def session(self) -> Session:
        """Of this operator."""
        return Session("MultiHeadAttention", "com.microsoft", 21)

    def run(self, call: Call) -> torch.Tensor:
        """Attend to all keys, or to those of a bias of 0 and -inf."""
        batch, heads, q_len, head_dim = call.query.shape
        query, key, value = (
            tensor.transpose(1, 2).reshape(batch, tensor.shape[2], heads * head_dim).numpy()
            for tensor in (call.query, call.repeated(call.keys), call.repeated(call.values))
        )
        bias = None
        if call.mask is not None:
            bias = torch.zeros(call.mask.shape, dtype=call.query.dtype).masked_fill(~call.mask, -math.inf).numpy()
        inputs: Inputs = {
            "query": query,
            "key": key,
            "value": value,
            "bias": None,
            "key_padding_mask": None,
            "attention_bias": bias,
        }
        out = self.session.run(inputs, ["output"], num_heads=heads, scale=call.scale)[0]
        return torch.from_numpy(out).reshape(batch, q_len, heads, head_dim).transpose(1, 2)


class OnnxRuntimeGQA(Adapter):
    """GroupQueryAttention with its cache, each call a right-padded chunk of ``query_seqlens`` tokens.

    It refuses rows without a key, so such a row is given the first of its padding as a token, in a slot that is spare.
    """

    name = "onnxruntime-gqa"
    requires: ClassVar[dict[str, str]] = {"onnxruntime": "onnxruntime", "onnx": "onnx"}
    capabilities = _GQA

    @cached_property
    def session(self) -> Session:
        """Of this operator."""
        return Session("GroupQueryAttention", "com.microsoft", 21)

    def run(self, call: Call) -> Result:
        """Append to buffers with room for the padded chunk, and attend."""
        batch, heads, q_len, head_dim = call.query.shape
        kv_heads = call.new_keys.shape[1]
        capacity = max(call.seq_lens) + q_len
        total = max(*call.kv_lens, q_len)
        new_lens = [new or int(kv_len == 0) for new, kv_len in zip(call.new_lens, call.kv_lens, strict=True)]
        buffers = []
        for old in call.buffers or (call.new_keys[:, :, :0], call.new_values[:, :, :0]):
            grown = old.new_zeros(batch, kv_heads, max(capacity, old.shape[2]), head_dim)
            grown[:, :, : old.shape[2]] = old
            buffers.append(grown.numpy())
        query, key, value = (
            tensor.transpose(1, 2).reshape(batch, q_len, -1).numpy()
            for tensor in (call.query, call.new_keys, call.new_values)
        )
        inputs: Inputs = {
            "query": query,
            "key": key,
            "value": value,
            "past_key": buffers[0],
            "past_value": buffers[1],
            "seqlens_k": np.add(call.seq_lens, new_lens, dtype=np.int32) - 1,
            "total_sequence_length": np.array(total, np.int32),
            **dict.fromkeys(("cos", "sin", "position_ids", "bias", "sink", "k_scale", "v_scale", "q_norm", "k_norm")),
            "query_seqlens": np.array(new_lens, np.int32),
        }
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": call.scale}
        out, new_keys, new_values = self.session.run(inputs, ["output", "present_key", "present_value"], **attributes)
        length = max(*call.kv_lens, call.buffers[0].shape[2] if call.buffers else 0)
        caches = torch.from_numpy(new_keys[:, :, :length]), torch.from_numpy(new_values[:, :, :length])
        return Result(torch.from_numpy(out).reshape(batch, q_len, heads, head_dim).transpose(1, 2), buffers=caches)
