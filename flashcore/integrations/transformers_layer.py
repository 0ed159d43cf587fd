"""The cache of one attention layer: a ``KVCache`` that the attention kernel itself appends to."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from flashcore.cache import KVCache
from flashcore.fast.attention_production import attention_with_kv_cache
from flashcore.integrations.transformers_padding import VisibleTokens


class NewTokens:
    """What ``FlashCoreLayer.update`` returns in place of tensors: new keys or values and where they belong.

    transformers updates the cache before it calls the attention function. Here the attention kernel itself appends,
    so ``update`` only passes the new tokens on. Whatever else tries to use them as a tensor gets an error, since the
    new tokens alone are not what it should attend to.
    """

    def __init__(self, layer: FlashCoreLayer, tokens: Tensor) -> None:
        """Tokens [batch, num_kv_heads, q_len, head_dim] on their way to ``layer``."""
        self.layer = layer
        self.tokens = tokens

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse to be used as a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(
            'FlashCoreCache must be used with attn_implementation="flashcore", got another attention function '
            f"that asked its keys for .{name}"
        )


class FlashCoreLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one attention layer.

    Attributes:
        kv: buffers and the number of real tokens in each row; None before the first call.
        columns: tokens of the padded batch seen so far, padding included.
        real: [batch, columns] bool on the host, which of them are tokens; None: all.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, num_kv_heads: int, head_dim: int, max_cache_len: int) -> None:
        """An empty layer; buffers are allocated when the first tokens tell batch, dtype and device."""
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_cache_len = max_cache_len
        self.kv: KVCache | None = None
        self.columns = 0
        self.real: Tensor | None = None
        self._module: weakref.ref[nn.Module] | None = None

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return -1 if self.kv is None else int(self.kv[0].shape[0])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers of ``max_cache_len`` slots for tokens like these."""
        del value_states
        batch = key_states.shape[0]
        self._hold(
            KVCache.allocate(
                batch, self.num_kv_heads, self.max_cache_len, self.head_dim, key_states.dtype, key_states.device
            )
        )

    def _hold(self, kv: KVCache) -> None:
        self.kv = kv
        self.keys, self.values = kv
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        """Pass new tokens [batch, num_kv_heads, q_len, head_dim] on to the attention function, which appends them.

        Raises:
            ValueError: they are not of this cache's model, batch, dtype or device.
        """
        shape, wanted = list(key_states.shape), [self.num_kv_heads, self.head_dim]
        if [shape[1], shape[3]] != wanted:
            raise ValueError(
                "past_key_values must be a cache of this model: it was made for [num_kv_heads, head_dim] = "
                f"{wanted}, got keys with {[shape[1], shape[3]]}"
            )
        if self.kv is None:
            self.lazy_initialization(key_states, value_states)
        assert self.kv is not None
        held = (self.batch_size, self.kv[0].dtype, self.kv[0].device)
        if held != (shape[0], key_states.dtype, key_states.device):
            raise ValueError(
                f"past_key_values must be a cache of this batch: it holds {held[0]} rows of {held[1]} on {held[2]}, "
                f"got {shape[0]} rows of {key_states.dtype} on {key_states.device}; reset() it, or make a new one"
            )
        return NewTokens(self, key_states), NewTokens(self, value_states)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: VisibleTokens, scale: float | None
    ) -> Tensor:
        """Append the new tokens and attend to all, in one launch.

        Args:
            module: the attention layer of the model.
            query: [batch, num_q_heads, q_len, head_dim]
            key: [batch, num_kv_heads, q_len, head_dim]
            value: like key.
            visible: which columns are real.
            scale: multiplies the logits.

        Returns:
            [batch, num_q_heads, q_len, head_dim]; 0 in padding columns.

        Raises:
            ValueError: the cache belongs to another model, or the mask contradicts what was cached before.
            CacheOverflowError: a row would pass ``max_cache_len`` real tokens; nothing was written.
        """
        owner = None if self._module is None else self._module()
        if self._module is not None and owner is not module:
            raise ValueError(
                "past_key_values must be a cache of this model, got one that another model has filled; "
                "reset() it, or make a new one"
            )
        if visible.cached != self.columns:
            raise ValueError(
                f"past_key_values must hold the same tokens in every layer, got {self.columns} in this layer and "
                f"{visible.cached} in the first: an earlier forward pass did not finish; crop() or reset() the cache"
            )
        past = visible.cached_real
        if (past is None) != (self.real is None) or (
            past is not None and self.real is not None and not torch.equal(past, self.real)
        ):
            raise ValueError(
                "attention_mask must mark the same padding as in earlier calls with this cache, got another mask for "
                "cached tokens: what was padding then was not stored"
            )
        out, cache, *_ = attention_with_kv_cache(
            visible.real_first(query),
            visible.real_first(key),
            visible.real_first(value),
            self.kv,
            cache_max_len=self.max_cache_len,
            scale=scale,
            is_causal=True,
            new_lens=visible.new_lens,
        )
        assert isinstance(cache, KVCache)
        self.kv = cache
        self.columns += visible.new
        self.real = visible.real
        self._module = weakref.ref(module)
        return visible.in_columns(out)

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included: what the next token's column is."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns after ``query_length`` more, and columns dropped: none."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """Real tokens that a row may hold."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget all tokens and the model; the buffers stay."""
        if self.kv is not None:
            self._shorten(0)
        self._module = None

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last ``-tokens_to_remove`` columns of every row. Nothing is copied.

        Assisted generation passes a tensor of one element, which is read here.

        Raises:
            ValueError: positive, which once meant the length to keep, or more columns than there are.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0 or -tokens_to_remove > self.columns:
            raise ValueError(
                f"tokens_to_remove must be a negative count of at most {self.columns} cached tokens, or 0, "
                f"got {tokens_to_remove}"
            )
        if tokens_to_remove and self.kv is not None:
            self._shorten(self.columns + tokens_to_remove)

    def _shorten(self, columns: int) -> None:
        assert self.kv is not None
        self.columns = columns
        if self.real is not None:
            kept = self.real[:, :columns]
            self.real = None if bool(kept.all()) else kept
        if self.real is None:
            lens = torch.full_like(self.kv.seq_lens, columns)
            self._hold(self.kv.appended(lens, columns, columns))
        else:
            counts = self.real.sum(1, dtype=torch.int32)
            lens = counts.to(self.kv.seq_lens.device)
            self._hold(self.kv.appended(lens, int(counts.max()), int(counts.min())))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``b`` become what row ``beam_idx[b]`` was, in the same buffers."""
        if self.kv is None or self.columns == 0:
            return
        index = beam_idx.to(self.kv[0].device)
        if len(index) != self.batch_size:
            self.batch_select_indices(index)
            return
        used = self._used()
        for buffer in self.kv:
            buffer[:, :, :used] = buffer[:, :, :used].index_select(0, index)
        self._select_lengths(self.kv, index)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order, in new buffers."""
        if self.kv is None or self.columns == 0:
            return
        rows = torch.arange(self.batch_size, device=self.kv[0].device)[indices]
        fresh = self._like(len(rows), self.kv)
        used = self._used()
        for new, old in zip(fresh, self.kv, strict=True):
            new[:, :, :used] = old[:, :, :used].index_select(0, rows)
        fresh.max_len, fresh.min_len = self.kv.max_len, self.kv.min_len
        fresh.seq_lens = self.kv.seq_lens
        self._select_lengths(fresh, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, in new buffers."""
        if self.kv is not None:
            rows = torch.arange(self.batch_size, device=self.kv[0].device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def _used(self) -> int:
        """Slots that any row uses, at most."""
        assert self.kv is not None
        return self.columns if self.kv.max_len is None else min(self.columns, self.kv.max_len)

    def _like(self, batch: int, kv: KVCache) -> KVCache:
        return KVCache.allocate(batch, self.num_kv_heads, kv.capacity, self.head_dim, kv[0].dtype, kv[0].device)

    def _select_lengths(self, kv: KVCache, rows: Tensor) -> None:
        longest = self.columns if kv.max_len is None else kv.max_len
        self._hold(kv.appended(kv.seq_lens.index_select(0, rows), longest, kv.min_len))
        if self.real is not None:
            self.real = self.real[rows.cpu()]

    def __deepcopy__(self, memo: dict[int, Any]) -> FlashCoreLayer:
        """A layer with buffers of its own, for prompts that are continued more than once."""
        copy = FlashCoreLayer(self.num_kv_heads, self.head_dim, self.max_cache_len)
        memo[id(self)] = copy
        copy.columns, copy.real, copy._module = self.columns, self.real, self._module
        if self.kv is not None:
            k_cache, v_cache = (buffer.clone() for buffer in self.kv)
            lens = self.kv.seq_lens.clone()
            copy._hold(KVCache(k_cache, v_cache, lens, max_len=self.kv.max_len, min_len=self.kv.min_len))
        return copy
