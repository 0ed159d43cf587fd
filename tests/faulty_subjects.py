"""Kernels that do what no exception can report: they kill their process, or never return.

Each follows the contract of ``properties.subjects.naive`` until a row holds 17 keys or more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from properties.subjects import naive
from properties.subjects.naive import SLOW, CacheOverflowError, KVCache

__all__ = [
    "SLOW",
    "CacheOverflowError",
    "KVCache",
    "aborts",
    "hangs",
    "hoards",
    "loses_the_context",
    "reads_far_outside",
]


def _until_17_keys(act: Callable[[], None]) -> Callable[..., Any]:
    def attention_with_kv_cache(*arguments: Any, **options: Any) -> Any:
        result = naive.attention_with_kv_cache(*arguments, **options)
        cache = result[1]
        if cache is not None and len(cache.seq_lens) and int(cache.seq_lens.max()) >= 17:
            act()
        return result

    return attention_with_kv_cache


def _read_far_outside() -> None:
    small = np.zeros(8, np.float32)
    far = np.lib.stride_tricks.as_strided(small, shape=(2,), strides=(1 << 44,))
    print(float(far[1]))


def _lose_the_context() -> None:
    """Fail an assertion on the GPU; nothing can be launched in this process any more."""
    torch.zeros(4, device="cuda")[torch.tensor([1 << 30], device="cuda")]


def _hoard() -> None:
    """Take 4 GiB and never return: without end, as far as a limit below that can tell."""
    held = [np.ones(1 << 24) for _ in range(32)]
    time.sleep(1e6 * len(held))


aborts = _until_17_keys(os.abort)
hangs = _until_17_keys(lambda: time.sleep(1e6))
hoards = _until_17_keys(_hoard)
loses_the_context = _until_17_keys(_lose_the_context)
reads_far_outside = _until_17_keys(_read_far_outside)
