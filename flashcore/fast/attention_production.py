"""Attention, with and without a KV cache: the contract's functions, and how they reach the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from flashcore import validation
from flashcore.cache import KVCache
from flashcore.fast import buffers, interpreter, interpreter_speed, relaunch, tuning

if interpreter.is_on():
    interpreter.correct_bfloat16()
    interpreter_speed.save_time()

from flashcore.fast.kernels.append import append_new_tokens
from flashcore.fast.kernels.prefill import prefill_attention
from flashcore.fast.kernels.primitives import (
    APPEND,
    HAS_NEW_LENS,
    HAS_SEQ_LENS,
    LONG_NEW_LENS,
    LONG_SEQ_LENS,
    RETURN_LSE,
)
from flashcore.fast.kernels.split_kv import split_kv_attention

Q_AXES = "[batch, num_q_heads, q_len, head_dim]"
NEW_AXES = "[batch, num_kv_heads, q_len, head_dim]"
CACHE_AXES = "[batch, num_kv_heads, capacity, head_dim]"
KV_AXES = "[batch, num_kv_heads, kv_len, head_dim]"


@dataclasses.dataclass(frozen=True)
class _Problem:
    """One launch: what is attended, in two segments of keys, and what is appended.

    Every query sees the cached segment whole; query ``i`` sees new key ``j`` iff ``j <= i + causal_offset``.
    """

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_new: Tensor
    v_new: Tensor
    max_cached: int  # the length of every row, or with seq_lens an upper bound
    num_new_keys: int
    qk_scale: float
    causal_offset: int
    seq_lens: Tensor | None = None
    new_lens: Tensor | None = None
    seq_lens_out: Tensor | None = None  # given when the new tokens are to be appended
    slot_limit: int = 0
    longest: int | None = None  # cached slots of the longest row at most, or when a graph was recorded
    shortest: int = 0  # cached slots that every row has, or had when a graph was recorded
    is_recorded: bool = False  # in a CUDA graph
    is_even: bool = True  # whether all rows are about as long, as far as the host knows
    owner: KVCache | None = None  # whose fault flag and counters the launch uses
    call: relaunch.Call | None = None  # under which the launch may be repeated for the owner

    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that the kernels read by tiles."""
        return self.query, self.k_cache, self.v_cache, self.k_new, self.v_new


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_m: int | None = None,
    block_n: int | None = None,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention without a cache.

        out[i] = sum_j softmax_j(scale * <q[i], k[j]>) * v[j]

    Args:
        q: [batch, num_q_heads, q_len, head_dim], float16, bfloat16 or float32; head_dim 1..256.
        k: [batch, num_kv_heads, kv_len, head_dim]; num_q_heads a multiple of num_kv_heads, query head ``h`` uses
            kv head ``h // (num_q_heads // num_kv_heads)``.
        v: like k.
        block_m: forces the tile of (query, head) rows: a power of two from 16 to 256.
        block_n: forces the tile of keys, likewise.
        scale: multiplies the logits. Default ``head_dim ** -0.5``.
        is_causal: query ``i`` sees key ``j`` iff ``j <= i + kv_len - q_len``: aligned bottom-right. For q_len=2,
            kv_len=5 (1 = visible)::

                1 1 1 1 0
                1 1 1 1 1

        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out [batch, num_q_heads, q_len, head_dim], contiguous, dtype of q; zeros where a query sees no key. With
        ``return_lse`` also lse [batch, num_q_heads, q_len] float32, natural logarithm; -inf where a query sees no key.

    Raises:
        TypeError, ValueError: ``<argument> must <constraint>, got <value>``.
        RuntimeError: CPU tensors without Triton's interpreter.

    Error:
        Within the budget derived in docs/numerics.md, whatever the tiles.
    """
    validation.check_tensor("q", q, Q_AXES)
    validation.check_tensor("k", k, KV_AXES)
    validation.check_tensor("v", v, KV_AXES)
    for name, tensor in (("k", k), ("v", v)):
        validation.check_alike(name, tensor, q, "q")
    batch, _, q_len, head_dim = q.shape
    validation.check_shape("k", k, [batch, k.shape[1], k.shape[2], head_dim], KV_AXES)
    validation.check_shape("v", v, k.shape, "of k")
    group_size = validation.check_heads("q", q, "k", k.shape[1])
    qk_scale = validation.check_scale(scale, head_dim)
    validation.check_flag("is_causal", is_causal)
    validation.check_flag("return_lse", return_lse)
    block_m, block_n = validation.check_tile("block_m", block_m), validation.check_tile("block_n", block_n)
    validation.check_device("q", q)

    # With a causal mask the last q_len keys are the diagonal, and what comes before is seen by every query,
    # as a cache is. A query before the first key sees nothing: then the offset is negative.
    kv_len = k.shape[2]
    diagonal = min(q_len, kv_len) if is_causal else 0
    problem = _Problem(
        query=q,
        k_cache=k,
        v_cache=v,
        k_new=k[:, :, kv_len - diagonal :],
        v_new=v[:, :, kv_len - diagonal :],
        max_cached=kv_len - diagonal,
        shortest=kv_len - diagonal,
        num_new_keys=diagonal,
        qk_scale=qk_scale,
        causal_offset=diagonal - q_len,
    )
    plan = tuning.plan(
        q_len=q_len,
        group_size=group_size,
        head_dim=head_dim,
        dtype=q.dtype,
        block_m=block_m,
        block_n=block_n,
        arch=tuning.architecture(q.device),
    )
    out, lse = _launch(problem, plan, return_lse)
    return (out, lse) if lse is not None else out


def attention_with_kv_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key_value: KVCache | tuple[Tensor, Tensor] | None = None,
    seq_lens: Tensor | None = None,
    cache_max_len: int = 4096,
    update_cache: bool = True,
    block_m: int | None = None,
    block_n: int | None = None,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    num_query_heads: int | None = None,
    num_kv_heads: int | None = None,
    new_lens: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, KVCache | None] | tuple[Tensor, KVCache | None, Tensor]:
    """Attend to the cached tokens and the new ones, and append the new ones to the cache in place.

    Args:
        query: [batch, num_q_heads, q_len, head_dim], float16, bfloat16 or float32; head_dim 1..256.
        key: [batch, num_kv_heads, q_len, head_dim], the new tokens.
        value: like key.
        past_key_value: a ``KVCache`` from an earlier call, or ``(k_cache, v_cache)``, each [batch, num_kv_heads,
            capacity, head_dim], together with ``seq_lens``. None starts a cache of ``cache_max_len`` slots.
        seq_lens: [batch] int32 or int64, slots valid BEFORE this call (not counting the new tokens). A KVCache
            carries its own; given beside one they replace them, for a roll-back. Reading them synchronises.
        cache_max_len: no row may grow past this many slots. Buffers that are too short grow, like a list, up to it.
        update_cache: False attends to cache and new tokens, writes nothing and returns no cache.
        block_m: forces the tile of (query, head) rows: a power of two from 16 to 256.
        block_n: forces the tile of keys, likewise.
        scale: multiplies the logits. Default ``head_dim ** -0.5``.
        is_causal: query ``i`` of row ``b`` stands at position ``seq_lens[b] + i`` and sees the keys at positions up to
            its own: aligned bottom-right. False: it sees every cached and every new token of its row.
        num_query_heads: cross-check of the shape of query.
        num_kv_heads: cross-check of the shape of key.
        new_lens: [batch] int32 or int64, how many of the q_len new tokens are real in each row; the others are
            right padding: never read, their output is 0 and their lse -inf. Default: all.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        ``(output, cache)`` or ``(output, cache, lse)``. output [batch, num_q_heads, q_len, head_dim], contiguous.
        cache: a ``KVCache`` (None with update_cache=False) with ``seq_lens`` AFTER the call. lse [batch, num_q_heads,
        q_len] float32, natural logarithm. A query that sees no key has output 0 and lse -inf.

    Raises:
        CacheOverflowError: ``seq_lens[b] + new_lens[b] > cache_max_len`` for some row; nothing was launched or written.
        TypeError, ValueError: ``<argument> must <constraint>, got <value>``.
        RuntimeError: CPU tensors without Triton's interpreter.

    Error:
        Within the budget derived in docs/numerics.md. A row's bits depend on that row alone: not on its
        neighbours in the batch, nor on spare capacity.
    """
    options = (cache_max_len, block_m, block_n, scale, is_causal, num_query_heads, num_kv_heads, return_lse)
    may_repeat = False
    if type(past_key_value) is KVCache and seq_lens is None and new_lens is None and update_cache is True:
        earlier = past_key_value.repeat(query, key, value, options)
        result = None if earlier is None else earlier.again(past_key_value, query, key, value)
        if result is not None:
            return result
        may_repeat = earlier is None

    group_size = _check_new_tokens(query, key, value, num_query_heads, num_kv_heads)
    batch, _, q_len, head_dim = query.shape
    qk_scale = validation.check_scale(scale, head_dim)
    for name, flag in (("update_cache", update_cache), ("is_causal", is_causal), ("return_lse", return_lse)):
        validation.check_flag(name, flag)
    validation.check_count("cache_max_len", cache_max_len, 1)
    block_m, block_n = validation.check_tile("block_m", block_m), validation.check_tile("block_n", block_n)
    if new_lens is not None:
        validation.check_lengths("new_lens", new_lens, batch, query.device)
    past = _check_cache(past_key_value, seq_lens, query, key, update_cache)
    validation.check_device("query", query)

    capturing = _is_capturing(query)
    lengths = _Lengths(past, seq_lens, new_lens, batch, q_len, capturing)
    if not (update_cache or isinstance(past, KVCache)):
        # There will be no cache to report what the device finds.
        if capturing and not (seq_lens is None and new_lens is None):
            raise ValueError(
                "past_key_value must be a KVCache where lengths are given to a call with update_cache=False recorded "
                f"in a CUDA graph, got {type(past_key_value).__name__}: nothing else could report a length out of range"
            )
        lengths.read()
    if update_cache:
        buffer_pair = _make_room(past, lengths, key, cache_max_len)
        seq_lens_out = buffers.empty([batch], torch.int32, query.device)
        owner: KVCache | None = KVCache(
            *buffer_pair,
            seq_lens_out,
            max_len=lengths.bound_after(),
            min_len=lengths.shortest_after(),
            like=past if isinstance(past, KVCache) else None,
        )
    else:
        # Without a cache the new tokens stand in for its buffers; no slot of them is visible as cached.
        buffer_pair = (key, value) if past is None else (past[0], past[1])
        seq_lens_out = None
        owner = past if isinstance(past, KVCache) else None
    k_cache, v_cache = buffer_pair
    capacity = k_cache.shape[2]
    problem = _Problem(
        query=query,
        k_cache=k_cache,
        v_cache=v_cache,
        k_new=key,
        v_new=value,
        max_cached=capacity if lengths.bound is None else lengths.bound,
        longest=lengths.longest,
        shortest=lengths.shortest,
        is_recorded=capturing,
        is_even=lengths.is_even,
        num_new_keys=q_len,
        qk_scale=qk_scale,
        causal_offset=0 if is_causal else q_len,
        seq_lens=None if past is None else lengths.seq_lens,
        new_lens=new_lens,
        seq_lens_out=seq_lens_out,
        slot_limit=min(capacity, cache_max_len),
        owner=owner,
        call=relaunch.Call(query, key, value, lengths.seq_lens, options)
        if may_repeat
        and lengths.bound is not None
        and lengths.seq_lens is not None
        and lengths.seq_lens.dtype == torch.int32
        else None,
    )
    plan = tuning.plan(
        q_len=q_len,
        group_size=group_size,
        head_dim=head_dim,
        dtype=query.dtype,
        block_m=block_m,
        block_n=block_n,
        arch=tuning.architecture(query.device),
    )
    out, lse = _launch(problem, plan, return_lse)
    cache = owner if update_cache else None
    return (out, cache) if lse is None else (out, cache, lse)


def _check_new_tokens(
    query: Tensor, key: Tensor, value: Tensor, num_query_heads: int | None, num_kv_heads: int | None
) -> int:
    """Check query, key and value against each other; return the group size."""
    validation.check_tensor("query", query, Q_AXES)
    for name, tensor in (("key", key), ("value", value)):
        validation.check_tensor(name, tensor, NEW_AXES)
        validation.check_alike(name, tensor, query, "query")
    batch, num_q_heads, q_len, head_dim = query.shape
    validation.check_shape("key", key, [batch, key.shape[1], q_len, head_dim], NEW_AXES)
    validation.check_shape("value", value, key.shape, "of key")
    group_size = validation.check_heads("query", query, "key", key.shape[1])
    validation.check_cross_check("num_query_heads", num_query_heads, num_q_heads, "query")
    validation.check_cross_check("num_kv_heads", num_kv_heads, key.shape[1], "key")
    return group_size


def _check_cache(
    past: object, seq_lens: Tensor | None, query: Tensor, key: Tensor, update_cache: bool
) -> KVCache | tuple[Tensor, Tensor] | None:
    """Check the cache buffers and the presence of lengths; the lengths' values are ``_Lengths``' business."""
    batch, num_kv_heads, _, head_dim = key.shape
    if seq_lens is not None:
        validation.check_lengths("seq_lens", seq_lens, batch, query.device)
    if past is None:
        return None
    if not isinstance(past, (tuple, list)):
        raise TypeError(f"past_key_value must be a KVCache or a pair (k_cache, v_cache), got {type(past).__name__}")
    if len(past) != 2:
        raise ValueError(f"past_key_value must be a KVCache or a pair (k_cache, v_cache), got {len(past)} elements")
    if not isinstance(past, KVCache) and seq_lens is None:
        raise ValueError(
            "seq_lens must be given with a plain (k_cache, v_cache), got None: how many slots are valid cannot be "
            "told from the buffers; pass seq_lens [batch], or the KVCache that the last call returned"
        )
    k_cache = validation.check_tensor("past_key_value[0]", past[0], CACHE_AXES)
    v_cache = validation.check_tensor("past_key_value[1]", past[1], CACHE_AXES)
    for name, tensor in (("past_key_value[0]", k_cache), ("past_key_value[1]", v_cache)):
        validation.check_alike(name, tensor, query, "query")
        validation.check_shape(name, tensor, [batch, num_kv_heads, k_cache.shape[2], head_dim], CACHE_AXES)
        if k_cache.shape[2] == 0:
            raise ValueError(f"{name} must have at least one slot, got capacity 0; pass None to start a cache")
        if update_cache:
            validation.check_writable(name, tensor)
    if isinstance(past, KVCache):
        validation.check_lengths("past_key_value.seq_lens", past.seq_lens, batch, query.device)
        return past
    return k_cache, v_cache


class _Lengths:
    """What the host knows of the lengths of a call, and the one place where it may wait to know more.

    Attributes:
        seq_lens: the tensor the kernel reads.
        longest, is_even: of the cached rows, as far as the host knows: for sharing out the work.
        bound: upper bound of the cached slots of any row; None while a graph is recorded, since a recorded call may
            be replayed at any length.
    """

    def __init__(
        self,
        past: KVCache | tuple[Tensor, Tensor] | None,
        seq_lens: Tensor | None,
        new_lens: Tensor | None,
        batch: int,
        q_len: int,
        capturing: bool,
    ) -> None:
        own = past.seq_lens if isinstance(past, KVCache) else None
        self.seq_lens = seq_lens if seq_lens is not None else own
        self.new_lens = new_lens
        self.capturing = capturing
        self.q_len = q_len
        self.batch = batch
        self.capacity = 0 if past is None else int(past[0].shape[2])
        self.bound: int | None = 0
        self.longest: int | None = None
        self.shortest = 0
        self.is_even = self.seq_lens is None
        self.cached: list[int] | None = [0] * batch if self.seq_lens is None else None
        self.new: list[int] | None = [q_len] * batch if new_lens is None else None
        if isinstance(past, KVCache) and not capturing:
            past.raise_known_faults()
        if new_lens is not None and new_lens.device.type == "cpu":
            self._read_new()
        if self.seq_lens is None:
            return
        if seq_lens is None and isinstance(past, KVCache):
            self.shortest, self.longest, self.is_even = past.min_len, past.max_len, past.is_even
        if capturing:
            self.bound = None
        elif seq_lens is None and isinstance(past, KVCache) and past.max_len is not None:
            self.bound = past.max_len
            if not 0 <= past.max_len <= self.capacity:
                self.read()
        else:
            self.read()
            if isinstance(past, KVCache):
                past.raise_known_faults()

    def read(self) -> tuple[list[int], list[int]]:
        """The lengths themselves, in range; waits for the device the first time."""
        if self.cached is None and self.seq_lens is not None:
            self.cached = self.seq_lens.tolist()
            meaning = "the capacity of the cache" if self.capacity else "no cache was given"
            validation.check_range("seq_lens", self.cached, self.capacity, meaning)
            self.bound = self.longest = max(self.cached, default=0)
            self.shortest = min(self.cached, default=0)
            self.is_even = 4 * self.shortest >= 3 * self.longest
        new = self._read_new()
        assert self.cached is not None
        return self.cached, new

    def _read_new(self) -> list[int]:
        if self.new is None and self.new_lens is not None:
            self.new = self.new_lens.tolist()
            validation.check_range("new_lens", self.new, self.q_len, "q_len")
        assert self.new is not None
        return self.new

    def bound_after(self) -> int | None:
        """Upper bound of the lengths after the call."""
        if self.bound is None:
            return None
        if self.cached is not None and self.new is not None:
            return max((c + n for c, n in zip(self.cached, self.new, strict=True)), default=0)
        return self.bound + (self.q_len if self.new is None else max(self.new, default=0))

    def shortest_after(self) -> int:
        """Lower bound of the lengths after the call."""
        if self.cached is not None and self.new is not None:
            return min((c + n for c, n in zip(self.cached, self.new, strict=True)), default=0)
        if self.new_lens is None:
            return self.shortest + self.q_len
        return self.shortest


def _make_room(
    past: KVCache | tuple[Tensor, Tensor] | None, lengths: _Lengths, key: Tensor, cache_max_len: int
) -> tuple[Tensor, Tensor]:
    """Buffers that hold every row after the call: those given, longer copies of them, or new ones.

    Synchronises only when the host's upper bound does not fit.

    Raises:
        CacheOverflowError: some row would pass ``cache_max_len``.
    """
    if lengths.bound is not None:
        needed = lengths.bound_after()
        assert needed is not None
        limit = cache_max_len if past is None else min(lengths.capacity, cache_max_len)
        if needed > limit:
            cached, new = lengths.read()
            validation.check_capacity(cached, new, cache_max_len)
            needed = lengths.bound_after() or 0
        if past is not None and needed > lengths.capacity:
            return _grow(past, min(cache_max_len, max(needed, 2 * lengths.capacity)))
    if past is not None:
        return past[0], past[1]
    batch, num_kv_heads, _, head_dim = key.shape
    shape = (batch, num_kv_heads, cache_max_len, head_dim)
    return buffers.empty(shape, key.dtype, key.device), buffers.empty(shape, key.dtype, key.device)


def _grow(past: tuple[Tensor, Tensor], capacity: int) -> tuple[Tensor, Tensor]:
    """Copies of both buffers with ``capacity`` slots; the old ones stay as they are for whoever holds them."""
    grown = []
    for old in past:
        batch, num_kv_heads, slots, head_dim = old.shape
        new = buffers.empty((batch, num_kv_heads, capacity, head_dim), old.dtype, old.device)
        new[:, :, :slots].copy_(old)
        grown.append(new)
    return grown[0], grown[1]


def _launch(problem: _Problem, plan: tuning.LaunchPlan, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Allocate the results and run the planned kernels on the device of the query."""
    query = problem.query
    batch, num_q_heads, q_len, head_dim = query.shape
    lse = buffers.empty([batch, num_q_heads, q_len], torch.float32, query.device) if return_lse else None
    if batch == 0 or q_len == 0:
        if problem.seq_lens_out is not None:
            problem.seq_lens_out.copy_(
                problem.seq_lens
            ) if problem.seq_lens is not None else problem.seq_lens_out.zero_()
        return buffers.empty(query.shape, query.dtype, query.device), lse
    with _on_device(query), interpreter.silent_arithmetic() if interpreter.is_on() else contextlib.nullcontext():
        readable = dataclasses.replace(
            problem,
            query=_readable(query),
            k_cache=_readable(problem.k_cache),
            v_cache=_readable(problem.v_cache),
            k_new=_readable(problem.k_new),
            v_new=_readable(problem.v_new),
        )
        out = buffers.empty(readable.query.shape, query.dtype, query.device)
        copied = readable.k_cache is not problem.k_cache or readable.v_cache is not problem.v_cache
        if any(a is not b for a, b in zip(readable.inputs(), problem.inputs(), strict=True)):
            readable = dataclasses.replace(readable, call=None)  # the copies of one call are not those of the next
        if copied and problem.seq_lens_out is not None:
            _launch_attention(dataclasses.replace(readable, seq_lens_out=None), plan, out, lse)
            _launch_append(problem)
        else:
            _launch_attention(readable, plan, out, lse)
    return (out if out.shape == query.shape else out[..., :head_dim].contiguous()), lse


def _launch_attention(problem: _Problem, plan: tuning.LaunchPlan, out: Tensor, lse: Tensor | None) -> None:
    """Run the planned attention kernel, which also appends if ``seq_lens_out`` is given."""
    query = problem.query
    batch, num_q_heads, q_len, head_dim = query.shape
    num_kv_heads = problem.k_cache.shape[1]
    group_size = num_q_heads // num_kv_heads
    row_tiles = tuning.ceil_div(q_len * group_size, plan.block_m)
    device = query.device
    unused_float, unused_int = buffers.unused(torch.float32, device), buffers.unused(torch.int32, device)
    sources = problem.inputs()
    lens = (problem.seq_lens, problem.new_lens)
    fault = unused_int
    if problem.owner is not None:
        fault = problem.owner.fault
    elif any(t is not None for t in lens):  # read and checked by the host: what the kernel could report is not missed
        fault = torch.zeros(2, dtype=torch.int32, device=device)
    flags = _flags(lens, append=problem.seq_lens_out is not None, return_lse=lse is not None)
    words = [None if t is None else _words(t) for t in lens]
    pointers = (*sources, *(unused_int if t is None else t for t in words))
    sizes = [
        problem.max_cached, q_len, problem.num_new_keys, problem.causal_offset,
        num_kv_heads, group_size, head_dim, problem.slot_limit,
    ]  # fmt: skip
    strides = (*(0 if t is None else t.stride(0) for t in words), *(s for t in sources for s in t.stride()[:3]))
    constants: dict[str, Any] = {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_D": plan.block_d,
        "MASK_D": plan.block_d != head_dim,
        "WIDE": any(max(plan.block_n, plan.block_new) * t.stride(2) >= 2**31 for t in sources[1:]),
    }
    outputs = (
        out,
        unused_float if lse is None else lse,
        unused_int if problem.seq_lens_out is None else problem.seq_lens_out,
    )
    if plan.path == "prefill":
        prefill_attention[(row_tiles * num_kv_heads * batch,)](
            *outputs, fault, *pointers, problem.qk_scale, *sizes, row_tiles, flags, *strides, **constants,
            **plan.compiler_options(),
        )  # fmt: skip
        return
    if plan.path == "prefill_sm90":
        from flashcore.fast import sm90

        sm90.launch(
            row_tiles * num_kv_heads * batch, plan, sources[1:],
            (*outputs, fault, *pointers, problem.qk_scale, *sizes, row_tiles, flags, *strides),
        )  # fmt: skip
        return
    grid_splits = plan.grid_splits(problem.max_cached)
    longest = problem.max_cached if problem.longest is None else problem.longest
    rows = row_tiles * num_kv_heads * batch
    shares = plan.share_out(rows, longest, problem.max_cached, is_even=problem.is_even, gpu=tuning.gpu(device))
    splits_per_program = shares.splits_per_program
    likely_split_size = plan.likely_split_size(
        problem.longest, problem.max_cached, is_even=problem.is_even, shortest=problem.shortest
    )
    if problem.is_recorded and plan.path == "split_sm90":
        likely_split_size = min(likely_split_size, 0)  # a graph is replayed for longer rows
    scratch: tuple[Tensor, ...] = (unused_float, unused_float, unused_float)
    arrivals = unused_int
    if grid_splits > 1:
        states = [batch, num_kv_heads, grid_splits, q_len * group_size]
        scratch = tuple(buffers.empty(shape, torch.float32, device) for shape in ([*states, head_dim], states, states))
    # A cache that is going to be split has its counters from the first call on: a graph that is recorded before
    # would have to zero counters of its own at each replay.
    appends = problem.seq_lens_out is not None
    if grid_splits > 1 or (appends and plan.grid_splits(problem.slot_limit) > 1):
        arrivals = _arrival_counters(problem, batch * num_kv_heads * row_tiles)
    row_programs = tuning.ceil_div(grid_splits, splits_per_program)
    splits = (
        grid_splits, splits_per_program, plan.unsplit_size, plan.kv_split_size, plan.few_splits, plan.max_splits,
        likely_split_size, *([row_programs, problem.shortest] if plan.path == "split_sm90" else []),
    )  # fmt: skip
    arguments = [
        *outputs, *scratch, arrivals, fault, *pointers, problem.qk_scale, *sizes, flags, *splits, *strides
    ]  # fmt: skip
    options = plan.compiler_options(several=splits_per_program > 1, crowded=shares.is_crowded)
    kernel: Any = split_kv_attention
    if plan.path == "split_sm90":
        from flashcore.fast import sm90
        from flashcore.fast.kernels.split_kv_sm90 import split_kv_attention_sm90

        kernel = split_kv_attention_sm90
        arguments += [sm90.describe(t, query, plan) for t in (problem.k_cache, problem.v_cache)]
        constants = sm90.split_constants(plan)
    else:
        several, _, unsplit = plan.kernel_kind(grid_splits, shares)
        constants |= {
            "BLOCK_NEW": plan.block_new,
            "ONE_QUERY": plan.one_query,
            "SEVERAL": several,
            "UNSPLIT": unsplit,
            "MERGE_M": plan.merge_m,
            "PREFETCH": not interpreter.is_on(),
        }
    arguments += [constants[name] for name in kernel.arg_names[len(arguments) :]]
    compiled = kernel[plan.grid(row_programs, num_kv_heads, batch, row_tiles)](*arguments, **options)
    if problem.call is not None and problem.owner is not None:
        again = relaunch.Relaunch(
            kernel, compiled, arguments, options, plan, problem.owner, query,
            problem.slot_limit, lse is not None, plan.kernel_kind(grid_splits, shares),
        )  # fmt: skip
        problem.owner.remember(problem.call, again)


def _flags(lens: tuple[Tensor | None, Tensor | None], *, append: bool, return_lse: bool) -> int:
    """The bits of a kernel's ``flags``."""
    bits = {
        HAS_SEQ_LENS: lens[0] is not None,
        HAS_NEW_LENS: lens[1] is not None,
        APPEND: append,
        RETURN_LSE: return_lse,
        LONG_SEQ_LENS: lens[0] is not None and lens[0].dtype == torch.int64,
        LONG_NEW_LENS: lens[1] is not None and lens[1].dtype == torch.int64,
    }
    return sum(int(bit.value) for bit, is_set in bits.items() if is_set)


def _words(lens: Tensor) -> Tensor:
    """[batch] int32 lengths, or [batch, 2] the words of int64 ones: a kernel for each type is one more to compile."""
    return lens if lens.dtype == torch.int32 else lens.unsqueeze(1).view(torch.int32)


def _launch_append(problem: _Problem) -> None:
    """Append the new tokens with a launch of their own, to a cache of any strides."""
    assert problem.seq_lens_out is not None
    assert problem.owner is not None
    batch, num_kv_heads, q_len, head_dim = problem.k_new.shape
    block_n = 16
    token_tiles = tuning.ceil_div(q_len, block_n)
    lens = (problem.seq_lens, problem.new_lens)
    words = [None if t is None else _words(t) for t in lens]
    caches, new = (problem.k_cache, problem.v_cache), (problem.k_new, problem.v_new)
    append_new_tokens[(token_tiles * num_kv_heads * batch,)](
        problem.seq_lens_out, problem.owner.fault, *caches, *new,
        *(buffers.unused(torch.int32, problem.k_new.device) if t is None else t for t in words),
        problem.max_cached, q_len, num_kv_heads, head_dim, problem.slot_limit, token_tiles,
        _flags(lens, append=True, return_lse=False),
        *(0 if t is None else t.stride(0) for t in words), *(s for t in (*caches, *new) for s in t.stride()),
        BLOCK_N=block_n, BLOCK_D=tuning.padded_head_dim(head_dim),
    )  # fmt: skip


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its layout keeps the attention kernels from reading it in whole 16-byte vectors.

    The kernels take any strides of batch, head and token that are multiples of 8 elements, over a head_dim of unit
    stride that is a multiple of 8 itself. Anything else is rare, and reading it element by element would spill
    registers: it is copied, padded with zeros to a multiple of 8, which changes no bit of a dot product.
    """
    *outer, head_dim = tensor.shape
    strides = [s for s, size in zip(tensor.stride(), outer, strict=False) if size > 1]
    if head_dim % 8 == 0 and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides):
        return tensor
    copy = buffers.empty([*outer, tuning.ceil_div(head_dim, 8) * 8], tensor.dtype, tensor.device)
    copy[..., :head_dim].copy_(tensor)
    copy[..., head_dim:].zero_()
    return copy


def _is_capturing(query: Tensor) -> bool:
    """Whether the call is being recorded in a CUDA graph, where the host may not wait for the device."""
    return query.is_cuda and torch.cuda.is_current_stream_capturing()


def _on_device(query: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of the query current: Triton launches on the current one."""
    if query.is_cuda and query.device.index != torch.cuda.current_device():
        return torch.cuda.device(query.device)
    return contextlib.nullcontext()


def _arrival_counters(problem: _Problem, count: int) -> Tensor:
    """Zeroed int32 counters, which every launch leaves at zero.

    A cache that is appended to keeps its own: two launches at once on one lineage of caches would already race for
    the same slots. Read-only calls may run at once on several streams, so each gets fresh ones.
    """
    if problem.seq_lens_out is None or problem.owner is None:
        return buffers.empty([count], torch.int32, problem.query.device).zero_()
    return problem.owner.arrival_counters(count)
