"""Somebody else's kernel: attention with a KV cache in plain PyTorch, one query at a time.

The example of what ``--subject package.module:function`` accepts. The function follows the contract of
``flashcore.attention_with_kv_cache``; beside it the suite looks in the same module for these names and does
without the ones that are missing:

    attention           the function without a cache (cases of that kind are not run without it)
    KVCache             ``KVCache(k_cache, v_cache, seq_lens)``; without it buffers are passed as a tuple with lengths
    CacheOverflowError  what a full cache raises; without it any RuntimeError counts
    SLOW                True: cases are small on a GPU too
    empty               allocator of outputs and buffers, replaced during a run by one that fills them with NaN
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

SLOW = True
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


class CacheOverflowError(RuntimeError):
    """A row would grow past ``cache_max_len``; nothing was written."""


class KVCache(tuple[torch.Tensor, torch.Tensor]):
    """``(k_cache, v_cache)`` that also knows ``seq_lens``, the slots of each row in use."""

    seq_lens: torch.Tensor

    def __new__(cls, k_cache: torch.Tensor, v_cache: torch.Tensor, seq_lens: torch.Tensor) -> KVCache:
        """Wrap two buffers [batch, num_kv_heads, capacity, head_dim] and the lengths [batch] of their rows."""
        cache = super().__new__(cls, (k_cache, v_cache))
        cache.seq_lens = seq_lens
        return cache


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate what the kernel will write."""
    return torch.empty(shape, dtype=dtype, device=device)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one query [head_dim] over keys and values [kv_len, head_dim], in float32.

    Returns:
        out: [head_dim] float32 and lse: scalar float32; 0 and -inf where there is no key.
    """
    if key.shape[0] == 0:
        return torch.zeros_like(query, dtype=torch.float32), query.new_full((), -math.inf, dtype=torch.float32)
    logits = (key.float() @ query.float()) * scale  # [kv_len]
    lse = torch.logsumexp(logits, dim=0)
    return torch.softmax(logits, dim=0) @ value.float(), lse


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_m: int | None = None,
    block_n: int | None = None,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    return_lse: bool = False,
    attend: Attend = attend,
) -> Any:
    """Attention without a cache; tiles are accepted and mean nothing here."""
    del block_m, block_n
    kv_lens = [k.shape[2]] * k.shape[0]
    out, lse = _attend_rows(q, k, v, kv_lens, [q.shape[2]] * len(kv_lens), scale, is_causal, attend)
    return (out, lse) if return_lse else out


def attention_with_kv_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
    seq_lens: torch.Tensor | None = None,
    cache_max_len: int = 4096,
    update_cache: bool = True,
    block_m: int | None = None,
    block_n: int | None = None,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    new_lens: torch.Tensor | None = None,
    return_lse: bool = False,
    attend: Attend = attend,
) -> Any:
    """Attend to the cached and the new tokens of each row, then store the new ones."""
    del block_m, block_n
    batch, num_kv_heads, q_len, head_dim = key.shape
    if past_key_value is None:
        cached = [0] * batch
    elif seq_lens is not None:
        cached = seq_lens.tolist()
    elif isinstance(past_key_value, KVCache):
        cached = past_key_value.seq_lens.tolist()
    else:
        raise ValueError("seq_lens must be given with a plain tuple of buffers, got None")
    new = [q_len] * batch if new_lens is None else new_lens.tolist()
    total = [old + more for old, more in zip(cached, new, strict=True)]
    if update_cache:
        for row in range(batch):
            if total[row] > cache_max_len:
                raise CacheOverflowError(
                    f"cache_max_len must be at least {total[row]} for row {row} "
                    f"({cached[row]} slots in use, {new[row]} new tokens), got {cache_max_len}"
                )

    if past_key_value is None:
        shape = (batch, num_kv_heads, cache_max_len, head_dim)
        k_cache, v_cache = (empty(shape, key.dtype, key.device) for _ in range(2))
    else:
        k_cache, v_cache = past_key_value
    longest = max(total, default=0)
    keys = key.new_zeros((batch, num_kv_heads, longest, head_dim))
    values = torch.zeros_like(keys)
    for row in range(batch):
        for together, buffer, tokens in ((keys, k_cache, key), (values, v_cache, value)):
            together[row, :, : cached[row]] = buffer[row, :, : cached[row]]
            together[row, :, cached[row] : total[row]] = tokens[row, :, : new[row]]
    out, lse = _attend_rows(query, keys, values, total, new, scale, is_causal, attend)

    cache = None
    if update_cache:
        capacity = k_cache.shape[2]
        if longest > capacity:
            capacity = min(cache_max_len, max(longest, 2 * capacity))
            k_cache, v_cache = (_grown(buffer, capacity) for buffer in (k_cache, v_cache))
        for row in range(batch):
            k_cache[row, :, cached[row] : total[row]] = key[row, :, : new[row]]
            v_cache[row, :, cached[row] : total[row]] = value[row, :, : new[row]]
        cache = KVCache(k_cache, v_cache, torch.tensor(total, dtype=torch.int32, device=key.device))
    return (out, cache, lse) if return_lse else (out, cache)


def _grown(buffer: torch.Tensor, capacity: int) -> torch.Tensor:
    larger = empty((*buffer.shape[:2], capacity, buffer.shape[3]), buffer.dtype, buffer.device)
    larger[:, :, : buffer.shape[2]] = buffer
    return larger


def _attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_lens: list[int],
    new_lens: list[int],
    scale: float | None,
    is_causal: bool,
    attend: Attend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bottom-right causal attention of the first ``new_lens[b]`` queries over the first ``kv_lens[b]`` keys."""
    batch, num_q_heads, q_len, head_dim = query.shape
    group_size = num_q_heads // key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    # BLAS picks its kernel by the strides, and with it the order of the sums: the bits must not depend on them.
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    out = empty((batch, num_q_heads, q_len, head_dim), query.dtype, query.device)
    lse = empty((batch, num_q_heads, q_len), torch.float32, query.device)
    out.zero_()
    lse.fill_(-math.inf)
    for b in range(batch):
        for h in range(num_q_heads):
            for i in range(new_lens[b]):
                visible = max(0, kv_lens[b] - new_lens[b] + i + 1) if is_causal else kv_lens[b]
                keys, values = key[b, h // group_size, :visible], value[b, h // group_size, :visible]
                row, lse[b, h, i] = attend(query[b, h, i], keys, values, scale)
                out[b, h, i] = row.to(out.dtype)
    return out, lse
