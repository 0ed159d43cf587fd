"""Attention with a KV cache in Triton."""

from flashcore.cache import KVCache
from flashcore.errors import CacheOverflowError
from flashcore.fast.attention_production import attention, attention_with_kv_cache

__all__ = ["CacheOverflowError", "KVCache", "attention", "attention_with_kv_cache"]
