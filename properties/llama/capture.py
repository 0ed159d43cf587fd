"""Record what the attention layers of a model ask flashcore, and what they get.

The recording is made at the two seams of the integration: where it calls the kernels, which shows what they read from
the cache, and where the library calls it, which shows what goes back into the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from flashcore import KVCache, attention_with_kv_cache
from flashcore.integrations import transformers as integration
from flashcore.integrations import transformers_layer
from properties.guards import bits_of
from properties.llama.activations import Activation
from references.rounding import decode

Float64Array = NDArray[np.float64]
FORMATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(eq=False)
class LayerCall:
    """One attention layer in one forward pass.

    Attributes:
        layer: its index.
        rows: for each row the problem that the kernel was given, read from the buffers it reads.
        outs: for each row the kernel's output, [num_q_heads, new_len, head_dim].
        returned: [batch, q_len, num_q_heads, head_dim], what the model got.
    """

    layer: int
    rows: list[Activation]
    outs: list[Float64Array]
    returned: Tensor
    _expected: dict[int, tuple[Float64Array, Float64Array]] = field(default_factory=dict)

    def expected(self, b: int) -> tuple[Float64Array, Float64Array]:
        """The exact output of row ``b`` and its error budget; computed once."""
        if b not in self._expected:
            self._expected[b] = self.rows[b].expected()
        return self._expected[b]


@dataclass(eq=False)
class Captured:
    """Everything recorded, in the order of the calls."""

    calls: list[LayerCall] = field(default_factory=list)

    def steps(self, num_layers: int) -> list[list[LayerCall]]:
        """The calls of each forward pass."""
        return [self.calls[i : i + num_layers] for i in range(0, len(self.calls), num_layers)]


@contextmanager
def capturing() -> Iterator[Captured]:
    """Record every attention layer with a ``FlashCoreCache`` inside the block."""
    captured = Captured()
    asked: list[tuple[list[Activation], list[Any]]] = []

    def recording(query: Tensor, key: Tensor, value: Tensor, past: KVCache, **options: Any) -> Any:
        cached = past.seq_lens.tolist()
        result: Any = attention_with_kv_cache(query, key, value, past, **options)
        q_len = query.shape[2]
        lens = options["new_lens"]
        new = [q_len] * len(cached) if lens is None else lens.tolist()
        fmt = FORMATS[query.dtype]
        scale = options["scale"]
        rows, outs = [], []
        for b, (old, more) in enumerate(zip(cached, new, strict=True)):
            k_cache, v_cache = (decode(bits_of(buffer[b, :, : old + more]), fmt) for buffer in result[1])
            rows.append(Activation(decode(bits_of(query[b, :, :more]), fmt), k_cache, v_cache, scale, fmt, old, q_len))
            outs.append(decode(bits_of(result[0][b, :, :more]), fmt))
        asked.append((rows, outs))
        return result

    def answering(module: Any, *arguments: Any, **options: Any) -> Any:
        returned, weights = integration.flashcore_attention(module, *arguments, **options)
        rows, outs = asked.pop()
        captured.calls.append(LayerCall(module.layer_idx, rows, outs, returned.detach().clone()))
        return returned, weights

    with mock.patch.object(transformers_layer, "attention_with_kv_cache", recording):
        AttentionInterface.register(integration.NAME, answering)
        try:
            yield captured
        finally:
            AttentionInterface.register(integration.NAME, integration.flashcore_attention)


def worst_of(call: LayerCall) -> float:
    """Largest error over budget of one call's rows.

    Raises:
        AssertionError: an output exceeds its budget.
    """
    worst = 0.0
    for b, out in enumerate(call.outs):
        if out.size == 0:
            continue
        exact, allowed = call.expected(b)
        used = float((np.abs(out - exact) / allowed).max())
        assert used <= 1.0, f"layer {call.layer}, row {b}: the attention output is off by {used:.2f} x its error budget"
        worst = max(worst, used)
    return worst
