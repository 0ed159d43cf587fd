"""Run a model again with its attention outputs given, on the library's own path.

If flashcore only attends, then the model with flashcore is the library's model in which each layer's attention
output is what flashcore returned: with the same calls every other operation sees the same bits and gives the same
bits. ``replay`` demands that of every query, key, value and logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from properties.guards import bits_of
from properties.llama.capture import FORMATS, LayerCall
from references.rounding import decode


@contextmanager
def attention_named(name: str, function: Any) -> Iterator[None]:
    """Let the library call ``function`` for this attention implementation inside the block."""
    AttentionInterface.register(name, function)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[name]


def replay(
    model: Any, inputs: Sequence[dict[str, Tensor]], steps: Sequence[Sequence[LayerCall]], mask: Tensor | None = None
) -> list[Tensor]:
    """Repeat forward passes with a ``DynamicCache`` and the recorded attention outputs.

    Args:
        model: the one that was recorded, or one with the same weights.
        inputs: arguments of each forward pass.
        steps: the recorded layers of each forward pass.
        mask: [batch, columns], which columns hold tokens; None: all.

    Returns:
        Logits of each forward pass.

    Raises:
        AssertionError: a layer was given other queries, keys or values than with flashcore.
    """
    waiting: list[LayerCall] = []

    def given(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        call = waiting.pop(0)
        assert call.layer == module.layer_idx
        real = (
            np.ones((query.shape[0], key.shape[2]), bool)
            if mask is None
            else mask[:, : key.shape[2]].cpu().numpy() != 0
        )
        for b, row in enumerate(call.rows):
            new = real[b, key.shape[2] - query.shape[2] :]
            for name, tensor, columns in (("query", query, new), ("key", key, real[b]), ("value", value, real[b])):
                seen = decode(bits_of(tensor[b]), FORMATS[tensor.dtype])[:, columns]
                same = np.array_equal(seen, getattr(row, name))
                assert same, f"layer {call.layer}, row {b}: flashcore was given another {name} than the library's path"
        return call.returned, None

    before = model.config._attn_implementation
    cache = DynamicCache(config=model.config)
    logits = []
    with attention_named("replayed", given), torch.no_grad():
        model.set_attn_implementation("replayed")
        try:
            for arguments, calls in zip(inputs, steps, strict=True):
                waiting = list(calls)
                logits.append(model(**arguments, past_key_values=cache).logits)
        finally:
            model.set_attn_implementation(before)
    return logits
