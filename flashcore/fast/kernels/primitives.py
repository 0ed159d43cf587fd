"""Tile-level building blocks shared by the prefill and the split-KV kernel.

Vocabulary: a *row* of a tile is one (query, head) pair. The heads of one group share a kv head, so the
rows of a tile are packed as ``row = query * group_size + head_in_group``: the tile reads each key once
for all heads of the group. A *segment* is a run of keys in one buffer: the cached slots, or the new tokens.
"""

import triton
import triton.language as tl

from flashcore.fast import tuning

# Bits of a kernel's ``flags``: what a call has and wants. They are run-time values, since nothing is compiled
# differently for them that could run faster.
HAS_SEQ_LENS = tl.constexpr(1)
HAS_NEW_LENS = tl.constexpr(2)
APPEND = tl.constexpr(4)
RETURN_LSE = tl.constexpr(8)
LONG_SEQ_LENS = tl.constexpr(16)
LONG_NEW_LENS = tl.constexpr(32)

SPLIT_GROUP = tl.constexpr(tuning.SPLIT_GROUP)

LENGTHS = ("seq_lens_ptr", "new_lens_ptr")
"""Read word by word: where in memory they begin is nothing to compile a kernel for."""


@triton.jit
def known_multiple_of_8(x):
    """``x``, in a form that tells the compiler what the host has checked: so it vectorises loads that step by it."""
    return x // 8 * 8


@triton.jit
def known_multiples_of_8(x, y, z):
    """``known_multiple_of_8`` of three strides."""
    return known_multiple_of_8(x), known_multiple_of_8(y), known_multiple_of_8(z)


@triton.jit
def load_tile(
    ptr, offs_n, offs_d, stride_n, stop, head_dim,
    MASK_N: tl.constexpr, MASK_D: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """Load rows ``offs_n`` of a [*, head_dim] matrix; rows at or past ``stop`` and padding columns are 0.

    The masks are part of the contract, not an optimisation: what they hide is never read, so that
    NaN in an unwritten slot cannot reach a product (0 * NaN is NaN). STREAMED: each row is read once, by one program.

    Returns [len(offs_n), len(offs_d)] in the dtype of ``ptr``.
    """
    EVICTION: tl.constexpr = "evict_first" if STREAMED else ""
    ptrs = ptr + offs_n[:, None] * stride_n + offs_d[None, :]
    if MASK_N and MASK_D:
        tile = tl.load(ptrs, mask=(offs_n < stop)[:, None] & (offs_d < head_dim)[None, :], other=0.0,
                       eviction_policy=EVICTION)  # fmt: skip
    elif MASK_N:
        tile = tl.load(ptrs, mask=(offs_n < stop)[:, None], other=0.0, eviction_policy=EVICTION)
    elif MASK_D:
        tile = tl.load(ptrs, mask=(offs_d < head_dim)[None, :], other=0.0, eviction_policy=EVICTION)
    else:
        tile = tl.load(ptrs, eviction_policy=EVICTION)
    return tile


@triton.jit
def prefetch_tile(ptr, start, stop, head_dim, stride_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Send for rows ``[start, start + BLOCK_N)`` of a [*, head_dim] matrix below ``stop``, as far as the L2 cache.

    No value reaches the program: rows that turn out to be invisible cost bandwidth and nothing else.
    """
    line: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    LINES: tl.constexpr = (BLOCK_D + line - 1) // line
    i = tl.arange(0, BLOCK_N * LINES)
    row = start + i // LINES
    column = i % LINES * line
    address = (ptr + row.to(tl.int64) * stride_n + column).to(tl.int64)
    address = tl.where((row < stop) & (column < head_dim), address, ptr.to(tl.int64))
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def online_softmax_update(acc, m_i, l_i, logits, v):
    """Fold one tile of keys into the running softmax state.

    acc     [BLOCK_M, BLOCK_D]  float32
    m_i     [BLOCK_M]           float32
    l_i     [BLOCK_M]           float32
    logits  [BLOCK_M, BLOCK_N]  float32, base 2, -inf where a key is hidden
    v       [BLOCK_N, BLOCK_D]  input dtype

    Invariant, before and after, over the keys folded so far:
        m_i = max_j logits[i, j]
        l_i = sum_j 2 ** (logits[i, j] - m_i)
        acc = sum_j 2 ** (logits[i, j] - m_i) * v[j]
    """
    m_new = tl.maximum(m_i, tl.max(logits, axis=1))
    # While a row has seen no key, m_new is -inf, and (-inf) - (-inf) is NaN.
    m_base = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - m_base)  # [BLOCK_M]; 0 on the first visible tile
    p = tl.exp2(logits - m_base[:, None])  # [BLOCK_M, BLOCK_N]
    l_i = l_i * alpha + tl.sum(p, axis=1)
    # P is rounded to the input dtype for the tensor cores; see docs/numerics.md.
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit
def contain_nonfinite_values(acc, v, offs_n, row_limit):
    """Keep a NaN or Inf value from the rows that do not see its key.

    Hidden keys have weight 0, but 0 * NaN is NaN: in a tile where some rows see a key and others do
    not, the product P.V would carry a non-finite value to all of them. Its elements are replaced by 0 and
    the rows that do see them get NaN directly: those whose limit lies past the first such key.

    acc        [BLOCK_M, BLOCK_D]  float32
    v          [BLOCK_N, BLOCK_D]  input dtype
    offs_n     [BLOCK_N]           position of each key in the segment
    row_limit  [BLOCK_M]           row i sees keys below row_limit[i]

    Returns acc and v; v has finite elements only. Tiles without such values, which is nearly all, only look for them.
    """
    finite = tl.abs(v.to(tl.float32)) < float("inf")  # false for NaN
    if tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) == 0:
        never: tl.constexpr = 2147483647
        first_nonfinite = tl.min(tl.where(finite, never, offs_n[:, None]), axis=0)  # [BLOCK_D]
        acc = tl.where(row_limit[:, None] > first_nonfinite[None, :], float("nan"), acc)
        v = tl.where(finite, v, 0.0)
    return acc, v


@triton.jit
def attend_tile(
    acc, m_i, l_i, q, k_ptr, v_ptr, start_n, stop, row_limit, qk_scale, head_dim,
    stride_kn, stride_vn,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASK_N: tl.constexpr, MASK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """Fold keys ``[start_n, start_n + BLOCK_N)`` of a segment into the running state.

    With MASK_N, row ``i`` sees the keys below ``row_limit[i]`` and none at or past ``stop`` is read.
    CAUSAL says that rows of the tile may see different keys; WIDE that an offset inside one tile can pass 2**31.
    """
    # int64: slot x stride passes 2**31 in a [batch, slots, heads, dim] cache of 2**18 slots x 64 heads x 128.
    k_tile_ptr = k_ptr + tl.cast(start_n, tl.int64) * stride_kn
    v_tile_ptr = v_ptr + tl.cast(start_n, tl.int64) * stride_vn
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    if WIDE:
        offs_n = offs_n.to(tl.int64)
    if MASK_N and CAUSAL:
        # Before the product, while there are registers for it.
        v = load_tile(v_tile_ptr, offs_n, offs_d, stride_vn, stop - start_n, head_dim, True, MASK_D, STREAMED)
        acc, v = contain_nonfinite_values(acc, v, start_n + offs_n, row_limit)
    k = load_tile(k_tile_ptr, offs_n, offs_d, stride_kn, stop - start_n, head_dim, MASK_N, MASK_D, STREAMED)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale  # [BLOCK_M, BLOCK_N]
    if MASK_N:
        visible = (start_n + offs_n)[None, :] < row_limit[:, None]
        logits = tl.where(visible, logits, -float("inf"))
    if not (MASK_N and CAUSAL):
        v = load_tile(v_tile_ptr, offs_n, offs_d, stride_vn, stop - start_n, head_dim, MASK_N, MASK_D, STREAMED)
    return online_softmax_update(acc, m_i, l_i, logits, v)


@triton.jit
def take_one_key(
    acc, m_i, l_i, q_ptrs, q_mask, k_ptrs, v_ptrs, in_head, qk_scale, num_keys, k_slot_ptrs, v_slot_ptrs, stores
):  # fmt: skip
    """Fold one new key, [BLOCK_D], or none (``num_keys`` 0), into the state of the rows q [BLOCK_M, BLOCK_D].

    ``stores``: whether to store it in its slot as well.
    """
    visible = in_head & (tl.zeros_like(in_head).to(tl.int32) < num_keys)
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)
    k = tl.load(k_ptrs, mask=visible, other=0.0)
    v = tl.load(v_ptrs, mask=visible, other=0.0)
    if stores:
        tl.store(k_slot_ptrs, k, mask=visible)
        tl.store(v_slot_ptrs, v, mask=visible)
    logit = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * qk_scale  # [BLOCK_M]
    exists = tl.zeros_like(logit) < num_keys
    return merge_partial(
        acc, m_i, l_i, v.to(tl.float32)[None, :], tl.where(exists, logit, -float("inf")), tl.where(exists, 1.0, 0.0)
    )


@triton.jit
def attend_new_tile(
    acc, m_i, l_i, q, k, v, row_limit, qk_scale, BLOCK_NEW: tl.constexpr,
):  # fmt: skip
    """Fold the new tokens, all in one tile, k and v [BLOCK_NEW, BLOCK_D]: row ``i`` sees those below row_limit[i]."""
    offs_n = tl.arange(0, BLOCK_NEW)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale  # [BLOCK_M, BLOCK_NEW]
    logits = tl.where(offs_n[None, :] < row_limit[:, None], logits, -float("inf"))
    acc, v = contain_nonfinite_values(acc, v, offs_n, row_limit)
    return online_softmax_update(acc, m_i, l_i, logits, v)


@triton.jit
def attend_segment(
    acc, m_i, l_i, q, k_ptr, v_ptr, start, stop, common_limit, row_limit, qk_scale, head_dim,
    stride_kn, stride_vn,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASK_D: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Fold keys ``[start, stop)`` of one segment into the running state.

    common_limit  scalar      keys below it are seen by every row of the tile
    row_limit     [BLOCK_M]   row i sees keys below row_limit[i]

    Tiles that every row sees whole run without masks; the rest (the partial tile at ``stop`` and, with
    CAUSAL, the tiles on the diagonal) run with them.
    """
    full_stop = start + tl.maximum(tl.minimum(stop, common_limit) - start, 0) // BLOCK_N * BLOCK_N
    for start_n in range(start, full_stop, BLOCK_N):
        acc, m_i, l_i = attend_tile(
            acc, m_i, l_i, q, k_ptr, v_ptr, start_n, stop, row_limit, qk_scale, head_dim,
            stride_kn, stride_vn, BLOCK_N, BLOCK_D, False, MASK_D, CAUSAL, WIDE, False,
        )  # fmt: skip
    # A tile or two, not worth a pipeline: without one the 16-bit kernels need fewer registers, float32's need more.
    STAGES: tl.constexpr = None if q.dtype == tl.float32 else 1
    for start_n in tl.range(full_stop, stop, BLOCK_N, num_stages=STAGES):
        acc, m_i, l_i = attend_tile(
            acc, m_i, l_i, q, k_ptr, v_ptr, start_n, stop, row_limit, qk_scale, head_dim,
            stride_kn, stride_vn, BLOCK_N, BLOCK_D, True, MASK_D, CAUSAL, WIDE, False,
        )  # fmt: skip
    return acc, m_i, l_i


@triton.jit
def store_tokens(k_cache_ptr, v_cache_ptr, first_slot, k, v, stop, head_dim, stride_kcn, stride_vcn,
                 BLOCK_NEW: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Store the new tokens below ``stop`` of one tile, bit for bit, at slots ``first_slot + token``."""
    offs_n = tl.arange(0, BLOCK_NEW)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_n < stop)[:, None] & (offs_d < head_dim)
    slot = (first_slot + offs_n).to(tl.int64)[:, None]
    tl.store(k_cache_ptr + slot * stride_kcn + offs_d, k, mask=mask)
    tl.store(v_cache_ptr + slot * stride_vcn + offs_d, v, mask=mask)


@triton.jit
def append_tokens(
    k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, first_slot, start, stop, head_dim,
    stride_kcn, stride_kcd, stride_vcn, stride_vcd, stride_knn, stride_knd, stride_vnn, stride_vnd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy new tokens ``[start, stop)`` bit for bit to slots ``first_slot + token``.

    Pointers are at the (batch row, kv head). Attention reads new tokens from their own argument and
    cached ones below ``first_slot``, so no program reads what another writes here.
    """
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_head = (offs_d < head_dim)[None, :]
    for token in range(start, stop, BLOCK_N):
        offs_n = token + tl.arange(0, BLOCK_N)
        mask = (offs_n < stop)[:, None] & in_head
        source = offs_n.to(tl.int64)[:, None]
        slot = (first_slot + offs_n).to(tl.int64)[:, None]
        k = tl.load(k_new_ptr + source * stride_knn + offs_d[None, :] * stride_knd, mask=mask)
        v = tl.load(v_new_ptr + source * stride_vnn + offs_d[None, :] * stride_vnd, mask=mask)
        tl.store(k_cache_ptr + slot * stride_kcn + offs_d[None, :] * stride_kcd, k, mask=mask)
        tl.store(v_cache_ptr + slot * stride_vcn + offs_d[None, :] * stride_vcd, v, mask=mask)


@triton.jit
def finish(acc, m_i, l_i, row_sees_keys):
    """Divide by the sum of weights: output [BLOCK_M, BLOCK_D] and natural-log LSE [BLOCK_M], both float32.

    A row that sees no key gives 0 and -inf.
    """
    ln_2: tl.constexpr = 0.6931471805599453
    # Rows without keys have acc = l_i = 0, and 0 / 0 is NaN.
    out = tl.where(row_sees_keys[:, None], acc / tl.where(row_sees_keys, l_i, 1.0)[:, None], 0.0)
    lse = tl.where(row_sees_keys, (m_i + tl.log2(l_i)) * ln_2, -float("inf"))
    return out, lse


@triton.jit
def store_output(
    out_ptr, lse_ptr, acc, m_i, l_i, out_row, in_tile, row_sees_keys, head_dim, in_head, flags
):  # fmt: skip
    """Store the output of a tile's rows, and the LSE if it is asked for, in the rows ``out_row`` of both."""
    out, lse = finish(acc, m_i, l_i, row_sees_keys)
    offs_d = tl.arange(0, in_head.shape[0])
    tl.store(
        out_ptr + out_row[:, None] * head_dim + offs_d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_tile[:, None] & in_head[None, :],
    )
    if flags & RETURN_LSE:
        tl.store(lse_ptr + out_row, lse, mask=in_tile)


@triton.jit
def no_keys(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The running state before any key: acc [BLOCK_M, BLOCK_D], m_i and l_i [BLOCK_M]."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    return acc, tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def merge_partial(acc, m_i, l_i, acc_s, m_s, l_s):
    """Fold the state of one split, [BLOCK_M, BLOCK_D] and [BLOCK_M] float32, into the running one.

    Both are unnormalised and in base 2, so only differences of maxima enter: the merge is as exact for logits
    of 1e4 as for logits of 1. An empty split (m_s = -inf, l_s = 0, acc_s = 0) changes nothing.
    """
    m_new = tl.maximum(m_i, m_s)
    m_base = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - m_base)
    beta = tl.exp2(m_s - m_base)
    # Never -0: so merging an empty split is the identity, and a group of splits may be merged with nothing first.
    return acc * alpha[:, None] + acc_s * beta[:, None] + 0.0, m_new, l_i * alpha + l_s * beta


@triton.jit
def stored_partial(
    partial, num_partials, partial_out_ptr, partial_m_ptr, partial_l_ptr, scratch, step, head_dim, in_tile, in_head
):
    """The stored state number ``partial``, acc [BLOCK_M, BLOCK_D], m_i and l_i [BLOCK_M], or that of no keys."""
    rows = tl.arange(0, in_tile.shape[0])
    offs_d = tl.arange(0, in_head.shape[0])
    exists = in_tile & (partial + tl.zeros_like(rows) < num_partials)
    at = scratch + partial * step
    m_i = tl.load(partial_m_ptr + at + rows, mask=exists, other=-float("inf"))
    l_i = tl.load(partial_l_ptr + at + rows, mask=exists, other=0.0)
    in_partial = rows[:, None] * head_dim + offs_d[None, :]
    acc = tl.load(partial_out_ptr + at * head_dim + in_partial, mask=exists[:, None] & in_head[None, :], other=0.0)
    return acc, m_i, l_i


@triton.jit
def stored_group(
    first, num_partials, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head
):  # fmt: skip
    """The stored states number ``first`` to ``first + 3``: acc, m_i and l_i of each, in one tuple."""
    n = num_partials
    acc_0, m_0, l_0 = stored_partial(first, n, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head)
    acc_1, m_1, l_1 = stored_partial(first + 1, n, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head)
    acc_2, m_2, l_2 = stored_partial(first + 2, n, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head)
    acc_3, m_3, l_3 = stored_partial(first + 3, n, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head)
    return acc_0, m_0, l_0, acc_1, m_1, l_1, acc_2, m_2, l_2, acc_3, m_3, l_3


@triton.jit
def merge_group(
    acc, m_i, l_i, states, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ARE_GROUPS: tl.constexpr
):  # fmt: skip
    """Fold four states into the running one: each for itself if they are groups, else as one group."""
    group_acc, group_m, group_l = acc, m_i, l_i
    if not ARE_GROUPS:
        group_acc, group_m, group_l = no_keys(BLOCK_M, BLOCK_D)
    group_acc, group_m, group_l = merge_partial(group_acc, group_m, group_l, states[0], states[1], states[2])
    group_acc, group_m, group_l = merge_partial(group_acc, group_m, group_l, states[3], states[4], states[5])
    group_acc, group_m, group_l = merge_partial(group_acc, group_m, group_l, states[6], states[7], states[8])
    group_acc, group_m, group_l = merge_partial(group_acc, group_m, group_l, states[9], states[10], states[11])
    if not ARE_GROUPS:
        group_acc, group_m, group_l = merge_partial(acc, m_i, l_i, group_acc, group_m, group_l)
    return group_acc, group_m, group_l


@triton.jit
def merge_stored(
    num_partials, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ARE_GROUPS: tl.constexpr,
):  # fmt: skip
    """Merge the stored states of a row's splits or groups of splits (ARE_GROUPS), in their order: the same bits always.

    The first begins at row ``scratch`` of each array, the others follow ``step`` rows apart.
    """
    n = num_partials
    acc, m_i, l_i = no_keys(BLOCK_M, BLOCK_D)
    if BLOCK_M * BLOCK_D <= 2048:
        # Two groups are loaded before the first state is merged: then their latencies overlap.
        for first in range(0, n, 2 * SPLIT_GROUP):
            group = stored_group(first, n, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head)
            second = first + SPLIT_GROUP
            next_group = stored_group(second, n, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head)
            acc, m_i, l_i = merge_group(acc, m_i, l_i, group, BLOCK_M, BLOCK_D, ARE_GROUPS)
            if second < n:
                acc, m_i, l_i = merge_group(acc, m_i, l_i, next_group, BLOCK_M, BLOCK_D, ARE_GROUPS)
    else:
        for first in range(0, n, SPLIT_GROUP):
            group_acc, group_m, group_l = acc, m_i, l_i
            if not ARE_GROUPS:
                group_acc, group_m, group_l = no_keys(BLOCK_M, BLOCK_D)
            for i in range(first, first + SPLIT_GROUP):
                acc_i, m_s, l_s = stored_partial(i, n, out_ptr, m_ptr, l_ptr, scratch, step, head_dim, in_tile, in_head)
                group_acc, group_m, group_l = merge_partial(group_acc, group_m, group_l, acc_i, m_s, l_s)
            if ARE_GROUPS:
                acc, m_i, l_i = group_acc, group_m, group_l
            else:
                acc, m_i, l_i = merge_partial(acc, m_i, l_i, group_acc, group_m, group_l)
    return acc, m_i, l_i


@triton.jit
def load_length(ptr, at, is_long):
    """An int32 length, or (is_long) one of two words: -1, which no length is, if it needs both, as 2**32 + 1 does."""
    low = tl.load(ptr + at)
    high = tl.load(ptr + at + is_long)
    return tl.where((is_long != 0) & (high != low >> 31), -1, low)


@triton.jit
def row_lengths(b, seq_lens_ptr, new_lens_ptr, stride_seq, stride_new, max_cached, q_len, num_new_keys, flags):
    """Lengths of batch row ``b``: cached keys, new keys, real queries (clamped), and whether they were in range.

    Without ``seq_lens`` every row has ``max_cached`` cached keys, without ``new_lens`` ``q_len`` real queries and
    ``num_new_keys`` new keys. Lengths are validated on the host where that costs no synchronisation; the clamp
    keeps what is read from the device from ever addressing memory outside the tensors. LONG lengths are int64, of which
    each pointer sees the words: so that their type is none of the kernel's.
    """
    cached = max_cached
    num_queries = q_len
    num_keys = num_new_keys
    lengths_ok = max_cached >= 0
    if flags & HAS_SEQ_LENS:
        given = load_length(seq_lens_ptr, b.to(tl.int64) * stride_seq, (flags & LONG_SEQ_LENS) // LONG_SEQ_LENS)
        cached = tl.minimum(tl.maximum(given, 0), max_cached).to(tl.int32)
        lengths_ok = lengths_ok & (cached == given)
    if flags & HAS_NEW_LENS:
        given_new = load_length(new_lens_ptr, b.to(tl.int64) * stride_new, (flags & LONG_NEW_LENS) // LONG_NEW_LENS)
        num_queries = tl.minimum(tl.maximum(given_new, 0), q_len).to(tl.int32)
        num_keys = num_queries
        lengths_ok = lengths_ok & (num_queries == given_new)
    return cached, num_keys, num_queries, lengths_ok


@triton.jit
def tile_rows(
    tile,
    num_queries,
    num_new_keys,
    causal_offset,
    q_len,
    group_size,
    BLOCK_M: tl.constexpr,
    ONE_QUERY: tl.constexpr,
):
    """Which query and head each row of a tile is, and how many new keys it sees.

    Query ``i`` sees new keys ``j <= i + causal_offset``. Queries at or past ``num_queries`` are padding: they are
    neither read nor see anything. ONE_QUERY: q_len is 1, which saves dividing, and the query sees every new key.

    Returns query [BLOCK_M], head in group [BLOCK_M], in_tile [BLOCK_M] (a row of the output),
    real [BLOCK_M] (a row with a real query), row_limit [BLOCK_M], common_limit and stop (scalars).
    """
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if ONE_QUERY:
        query = tl.zeros([BLOCK_M], tl.int32)
        head = rows
        in_tile = rows < group_size
        real = in_tile & (query < num_queries)
        row_limit = query + num_new_keys
        common_limit = num_new_keys
        stop = num_new_keys
    else:
        query = rows // group_size
        head = rows % group_size
        in_tile = query < q_len
        real = query < num_queries
        first = tile * BLOCK_M // group_size
        last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group_size, num_queries - 1)
        row_limit = tl.minimum(tl.maximum(query + causal_offset + 1, 0), num_new_keys)
        common_limit = tl.minimum(tl.maximum(first + causal_offset + 1, 0), num_new_keys)
        stop = tl.minimum(tl.maximum(last + causal_offset + 1, 0), num_new_keys)
    return query, head, in_tile, real, tl.where(real, row_limit, 0), common_limit, stop


@triton.jit
def row_splits(
    cached, unsplit_size, kv_split_size, few_splits, max_splits,
    LONG: tl.constexpr, LONGEST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Number of splits of a row with ``cached`` slots, and the slots of each but the last, in whole tiles.

    ``LaunchPlan.grid_splits`` and ``split_size`` are the same arithmetic on the host. One split up to
    ``unsplit_size`` slots; then splits of ``kv_split_size`` until
    there are ``few_splits``, of LONG times that until there are twice as many, then of LONGEST times that;
    longer ones rather than more than ``max_splits``.
    """
    shortest = tl.cdiv(cached, kv_split_size)  # rounding up once and again is rounding up, and shifts are no divisions
    wanted = tl.minimum(shortest, few_splits)
    wanted = tl.maximum(wanted, tl.minimum(tl.cdiv(shortest, LONG), 2 * few_splits))
    wanted = tl.minimum(tl.maximum(wanted, tl.cdiv(shortest, LONGEST)), max_splits)
    wanted = tl.where(cached <= unsplit_size, 1, wanted)
    size = tl.maximum(tl.cdiv(tl.cdiv(cached, tl.maximum(wanted, 1)), BLOCK_N), 1) * BLOCK_N
    return tl.maximum(tl.cdiv(cached, size), 1), size


@triton.jit
def report_fault(fault_ptr, b, lengths_ok, fits):
    """Record in ``fault`` [2] int32, as ``row + 1``, a row that does not fit and a row whose lengths are out of range.

    Only calls that could not be checked on the host (recorded in a CUDA graph, lengths on the device) come here
    with something to report. See ``KVCache.check``.
    """
    if lengths_ok:
        if fits == 0:
            tl.store(fault_ptr, b + 1)
    else:
        tl.store(fault_ptr + 1, b + 1)
