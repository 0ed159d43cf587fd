"""``attn_implementation="flashcore"`` for Llama-family models of the transformers library.

Importing this module registers the attention function and its mask::

    from flashcore.integrations.transformers import FlashCoreCache

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flashcore")
    model.generate(**inputs, past_key_values=FlashCoreCache(model.config, max_cache_len=4096))

What is not supported raises; nothing falls back to another implementation. See docs/transformers.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils

from flashcore.cache import KVCache
from flashcore.fast.attention_production import attention, attention_with_kv_cache
from flashcore.integrations.transformers_cache import FlashCoreCache
from flashcore.integrations.transformers_layer import NewTokens
from flashcore.integrations.transformers_padding import VisibleTokens, visible_tokens

__all__ = ["NAME", "FlashCoreCache", "flashcore_attention"]

NAME = "flashcore"

# Arguments that some attention layers pass, and what their being set means. None of them may be ignored.
FEATURES = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
    "cu_seq_lens_q": "packed batches (cu_seq_lens_q)",
    "cu_seq_lens_k": "packed batches (cu_seq_lens_k)",
    "output_attentions": "output_attentions (the weights are never formed)",
}
# Arguments that say nothing about which keys are attended, or how.
HARMLESS = {"position_ids", "use_cache", "num_items_in_batch", "output_hidden_states", "max_length_q", "max_length_k"}


def flashcore_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | NewTokens,
    value: Tensor | NewTokens,
    attention_mask: VisibleTokens | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface: one layer's attention.

    Args:
        module: the attention layer.
        query: [batch, num_q_heads, q_len, head_dim]
        key: what the cache's ``update`` returned. A ``FlashCoreCache``: the new tokens, which are appended here.
            Another cache, or none: [batch, num_kv_heads, kv_len, head_dim], cached columns first, padding included.
        value: like key.
        attention_mask: what ``visible_tokens`` returned.
        scaling: multiplies the logits.
        dropout: must be 0.
        kwargs: whatever else the layer passes; features that flashcore has not are refused.

    Returns:
        out [batch, q_len, num_q_heads, head_dim], 0 in padding columns; and None, since weights are never formed.

    Raises:
        NotImplementedError: a feature that flashcore does not have; the text names it.
        ValueError: see ``visible_tokens`` and ``FlashCoreLayer``; inputs that require grad while grad is enabled.
        TypeError: a dtype that flashcore does not have.
        RuntimeError: CPU tensors without Triton's interpreter.
        CacheOverflowError: a row would pass ``max_cache_len``.
    """
    _refuse_features(dropout, kwargs)
    if not isinstance(attention_mask, VisibleTokens):
        got = "None" if attention_mask is None else f"a custom mask of shape {list(attention_mask.shape)}"
        raise NotImplementedError(
            "attention_mask must be [batch, columns] and pass through the model, which turns it into lengths, "
            f"got {got} in an attention layer"
        )
    if isinstance(key, NewTokens) and isinstance(value, NewTokens):
        out = key.layer.attend(module, query, key.tokens, value.tokens, attention_mask, scaling)
    else:
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        if key.shape[3] != value.shape[3]:
            raise NotImplementedError(
                "flashcore does not support separate head sizes for keys and values, as multi-head latent attention "
                f"has, got {key.shape[3]} and {value.shape[3]}"
            )
        out = _attend(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2), None


def _refuse_features(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(f"flashcore is forward only and has no dropout, got attention dropout {dropout}")
    for name, argument in kwargs.items():
        if argument is None or name in HARMLESS or (name in FEATURES and argument is False):
            continue
        if name == "is_causal" and argument is True:
            continue
        feature = FEATURES.get(name, f"the argument {name} of this model's attention")
        raise NotImplementedError(f"flashcore does not support {feature}, got {name}={_brief(argument)}")


def _brief(argument: object) -> str:
    return f"a tensor of shape {list(argument.shape)}" if isinstance(argument, Tensor) else repr(argument)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: VisibleTokens, scale: float | None) -> Tensor:
    """Attend to keys and values that hold cached and new columns; with padding, to a compacted copy of them."""
    if key.shape[2] != visible.cached + visible.new:
        raise NotImplementedError(
            "past_key_values must be a FlashCoreCache or a DynamicCache of whole sequences, got a cache that returned "
            f"{key.shape[2]} columns for {visible.cached} cached and {visible.new} new ones"
        )
    if visible.real is None:
        out = attention(query, key, value, scale=scale, is_causal=True)
        assert isinstance(out, Tensor)
        return out
    past = None
    if visible.cached:
        k_cache, v_cache = key[:, :, : visible.cached], value[:, :, : visible.cached]
        real = visible.real[:, : visible.cached]
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True).to(query.device)[:, None, :, None]
        counts = real.sum(1, dtype=torch.int32)
        past = KVCache(
            k_cache.take_along_dim(order, dim=2),
            v_cache.take_along_dim(order, dim=2),
            counts.to(query.device),
            max_len=int(counts.max()),
        )
    k_new, v_new = (visible.real_first(tokens[:, :, visible.cached :]) for tokens in (key, value))
    out, *_ = attention_with_kv_cache(
        visible.real_first(query),
        k_new,
        v_new,
        past,
        update_cache=False,
        scale=scale,
        is_causal=True,
        new_lens=visible.new_lens,
    )
    return visible.in_columns(out)


def _register() -> None:
    """Make the name known to the library.

    The library takes every name that contains "flash" for a build of FlashAttention: when a model is made it loads
    that build, or another one that the model prefers. There is nothing to load here, nothing may take flashcore's
    place, and there is no public way to say so: where models are made, the question is answered for this one name.
    """
    AttentionInterface.register(NAME, flashcore_attention)
    AttentionMaskInterface.register(NAME, visible_tokens)
    ask = modeling_utils.is_flash_attention_requested

    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, version: Any = None
    ) -> Any:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name != NAME and ask(config, requested_attention_implementation, version)

    modeling_utils.is_flash_attention_requested = is_flash_attention_requested


_register()
