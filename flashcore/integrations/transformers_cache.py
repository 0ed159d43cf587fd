"""A transformers cache of one ``KVCache`` a layer: static buffers, appended to in place by the attention kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from flashcore.integrations.transformers_layer import FlashCoreLayer


class FlashCoreCache(Cache):  # type: ignore[misc]
    """Pass it as ``past_key_values`` to a model with ``attn_implementation="flashcore"``.

    Each layer keeps buffers [batch, num_kv_heads, max_cache_len, head_dim] for keys and for values, allocated once,
    to which the attention kernel appends. ``crop`` copies nothing, ``reorder_cache`` copies the used slots.

    Args:
        config: of the model.
        max_cache_len: real tokens that a row may hold; padding is not stored and does not count.

    Raises:
        NotImplementedError: a layer of the model does not attend to whole sequences, or does not keep keys and values.
    """

    def __init__(self, config: Any, max_cache_len: int = 4096) -> None:
        """Empty layers for a model of this configuration."""
        text = config.get_text_config(decoder=True)
        for name in ("sliding_window", "attention_chunk_size"):
            if getattr(text, name, None) is not None:
                raise NotImplementedError(
                    f"flashcore attends to whole sequences; {name}={getattr(text, name)} is not supported"
                )
        kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention"}
        if kinds:
            raise NotImplementedError(f"flashcore caches full_attention layers only, got {', '.join(sorted(kinds))}")
        if getattr(text, "kv_lora_rank", None) is not None:
            raise NotImplementedError(
                f"flashcore does not support multi-head latent attention, got kv_lora_rank={text.kv_lora_rank}"
            )
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int):
            raise TypeError(f"max_cache_len must be an int, got {max_cache_len!r}")
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len must be at least 1, got {max_cache_len}")
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        super().__init__(layers=[FlashCoreLayer(heads, head_dim, max_cache_len) for _ in range(text.num_hidden_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Pass new tokens on to the attention function of layer ``layer_idx``, which appends them."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"past_key_values must be a cache of this model, got one of {len(self.layers)} layers for its "
                f"layer {layer_idx}"
            )
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]

    def check(self) -> None:
        """Wait for the device and raise what kernels found in calls recorded in a CUDA graph; see ``KVCache.check``."""
        for layer in self.layers:
            if layer.kv is not None:
                layer.kv.check()
