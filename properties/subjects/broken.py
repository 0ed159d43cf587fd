"""The naive subject with one fault: phantom keys.

Keys are padded with zeros to a multiple of 16, as a tiled kernel pads its last tile, and the padding is not
masked: it takes part in the softmax with score 0. Every length that is not a multiple of 16 is wrong. Used in the
documentation and in the tests of the suite: verify must reject it within seconds.
"""

from __future__ import annotations

import functools

import torch

from properties.subjects import naive
from properties.subjects.naive import SLOW, CacheOverflowError, KVCache, empty

__all__ = ["SLOW", "CacheOverflowError", "KVCache", "attention", "attention_with_kv_cache", "empty"]


def attend_with_phantom_keys(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``naive.attend``, but the padding of the last tile of 16 keys is not masked."""
    padding = -key.shape[0] % 16
    key, value = (torch.nn.functional.pad(tokens, (0, 0, 0, padding)) for tokens in (key, value))
    return naive.attend(query, key, value, scale)


attention = functools.partial(naive.attention, attend=attend_with_phantom_keys)
attention_with_kv_cache = functools.partial(naive.attention_with_kv_cache, attend=attend_with_phantom_keys)
