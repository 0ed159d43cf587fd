"""Split-KV attention: several programs share the keys of one row, for decode and short chunks."""

import triton
import triton.language as tl

from flashcore.fast.kernels.primitives import (
    attend_new_tile,
    attend_tile,
    finish,
    known_multiple_of_8,
    known_multiples_of_8,
    load_tile,
    merge_partial,
    report_fault,
    row_lengths,
    split_range,
    store_tokens,
    tile_rows,
)

# Sizes and strides are run-time values that do not enter the cache key of compiled kernels; only
# the constexprs do. So drawing or meeting a new shape compiles nothing.
RUN_TIME_ARGUMENTS = """
    max_cached q_len num_new_keys causal_offset num_kv_heads group_size head_dim slot_limit row_tiles
    grid_splits kv_split_size max_splits
    stride_seq stride_new
    stride_qb stride_qh stride_qm
    stride_kcb stride_kch stride_kcn stride_vcb stride_vch stride_vcn
    stride_knb stride_knh stride_knn stride_vnb stride_vnh stride_vnn
""".split()


@triton.jit(do_not_specialize=RUN_TIME_ARGUMENTS)
def split_kv_attention(
    out_ptr, lse_ptr, seq_lens_out_ptr, partial_out_ptr, partial_m_ptr, partial_l_ptr, arrivals_ptr, fault_ptr,
    q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, seq_lens_ptr, new_lens_ptr,
    qk_scale,
    max_cached, q_len, num_new_keys, causal_offset, num_kv_heads, group_size, head_dim, slot_limit, row_tiles,
    grid_splits, kv_split_size, max_splits,
    stride_seq, stride_new,
    stride_qb, stride_qh, stride_qm,
    stride_kcb, stride_kch, stride_kcn, stride_vcb, stride_vch, stride_vcn,
    stride_knb, stride_knh, stride_knn, stride_vnb, stride_vnh, stride_vnn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NEW: tl.constexpr, BLOCK_D: tl.constexpr,
    NEW_AHEAD: tl.constexpr, MASK_D: tl.constexpr,
    WIDE: tl.constexpr, CAUSAL: tl.constexpr, APPEND: tl.constexpr,
    HAS_SEQ_LENS: tl.constexpr, HAS_NEW_LENS: tl.constexpr, RETURN_LSE: tl.constexpr,
):  # fmt: skip
    """Attend one tile of (query, head) rows to one range of the cached keys; the last program to arrive merges.

    The ranges of a batch row follow from its own length alone (``split_range``), never from the batch or the capacity:
    that is what makes its bits independent of its neighbours. The last range also takes the new tokens.

    Scratch: partial_out [batch, num_kv_heads, grid_splits, q_len * group_size, head_dim], partial_m and partial_l
    without the last dimension, float32; arrivals [batch, num_kv_heads, row_tiles] int32, zero before and after.
    Grid: grid_splits x row_tiles x num_kv_heads x batch in one dimension; programs past a row's own ranges leave.
    """
    head_dim = known_multiple_of_8(head_dim)
    stride_kcb, stride_kch, stride_kcn = known_multiples_of_8(stride_kcb, stride_kch, stride_kcn)
    stride_vcb, stride_vch, stride_vcn = known_multiples_of_8(stride_vcb, stride_vch, stride_vcn)
    stride_knb, stride_knh, stride_knn = known_multiples_of_8(stride_knb, stride_knh, stride_knn)
    stride_vnb, stride_vnh, stride_vnn = known_multiples_of_8(stride_vnb, stride_vnh, stride_vnn)
    pid = tl.program_id(0)
    s = pid % grid_splits
    tile = pid // grid_splits % row_tiles
    h = pid // grid_splits // row_tiles % num_kv_heads
    b = pid // grid_splits // row_tiles // num_kv_heads

    cached, new_keys, num_queries, lengths_ok = row_lengths(
        b, seq_lens_ptr, new_lens_ptr, stride_seq, stride_new, max_cached, q_len, num_new_keys,
        HAS_SEQ_LENS, HAS_NEW_LENS,
    )  # fmt: skip
    num_splits, start, stop = split_range(s, cached, kv_split_size, max_splits, BLOCK_N)
    if s >= num_splits:
        return
    is_last = s == num_splits - 1
    query, head, in_tile, real, row_limit, _, _ = tile_rows(
        tile, num_queries, new_keys, causal_offset, q_len, group_size, BLOCK_M, CAUSAL
    )
    # int64: batch x heads x queries x head_dim passes 2**31 for 64 prompts of 8192 tokens with 32 heads of 128.
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    q_head = h64 * group_size + head
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < head_dim
    q_ptrs = (
        q_ptr + b64 * stride_qb + (q_head * stride_qh + query.to(tl.int64) * stride_qm)[:, None]
        + offs_d[None, :]
    )  # fmt: skip
    q = tl.load(q_ptrs, mask=real[:, None] & in_head[None, :], other=0.0)
    k_cache_ptr += b64 * stride_kcb + h64 * stride_kch
    v_cache_ptr += b64 * stride_vcb + h64 * stride_vch
    k_new_ptr += b64 * stride_knb + h64 * stride_knh
    v_new_ptr += b64 * stride_vnb + h64 * stride_vnh

    new_n = tl.arange(0, BLOCK_NEW)
    if WIDE:
        new_n = new_n.to(tl.int64)
    if NEW_AHEAD:
        # Issued before the loop over the cache, so that the new tokens are there when it ends.
        new_visible = tl.where(is_last, new_keys, 0)
        k_new = load_tile(k_new_ptr, new_n, offs_d, stride_knn, new_visible, head_dim, True, MASK_D, False)
        v_new = load_tile(v_new_ptr, new_n, offs_d, stride_vnn, new_visible, head_dim, True, MASK_D, False)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    # Every query sees every cached slot: only the new tokens have a diagonal.
    cached_limit = tl.zeros([BLOCK_M], tl.int32) + stop
    for start_n in range(start, stop, BLOCK_N):
        acc, m_i, l_i = attend_tile(
            acc, m_i, l_i, q, k_cache_ptr, v_cache_ptr, start_n, stop, cached_limit, qk_scale, head_dim,
            stride_kcn, stride_vcn, BLOCK_N, BLOCK_D, True, MASK_D, False, WIDE, True,
        )  # fmt: skip

    fits = lengths_ok & (cached + num_queries <= slot_limit)
    if is_last:
        if not NEW_AHEAD:
            k_new = load_tile(k_new_ptr, new_n, offs_d, stride_knn, new_keys, head_dim, True, MASK_D, False)
            v_new = load_tile(v_new_ptr, new_n, offs_d, stride_vnn, new_keys, head_dim, True, MASK_D, False)
        acc, m_i, l_i = attend_new_tile(acc, m_i, l_i, q, k_new, v_new, row_limit, qk_scale, BLOCK_NEW, CAUSAL)
        # The last split stores the new tokens of its kv head; one program a batch row writes the row's length.
        if APPEND:
            if tile == 0:
                if h == 0:
                    tl.store(seq_lens_out_ptr + b, tl.where(fits, cached + num_queries, cached))
                    report_fault(fault_ptr, b, lengths_ok, fits)
                if fits:
                    store_tokens(
                        k_cache_ptr, v_cache_ptr, cached, k_new, v_new, num_queries, head_dim,
                        stride_kcn, stride_vcn, BLOCK_NEW, BLOCK_D,
                    )  # fmt: skip
        elif HAS_SEQ_LENS or HAS_NEW_LENS:
            if (tile == 0) & (h == 0):
                report_fault(fault_ptr, b, lengths_ok, lengths_ok)

    merges = True
    if num_splits > 1:
        scratch = (b64 * num_kv_heads + h) * grid_splits * q_len * group_size + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        scratch_step = q_len * group_size
        mine = scratch + s * scratch_step
        partial_mask = in_tile[:, None] & in_head[None, :]
        tl.store(partial_out_ptr + mine[:, None] * head_dim + offs_d[None, :], acc, mask=partial_mask)
        tl.store(partial_m_ptr + mine, m_i, mask=in_tile)
        tl.store(partial_l_ptr + mine, l_i, mask=in_tile)
        # Every thread's stores come before the arrival that publishes them.
        tl.debug_barrier()
        arrival_ptr = arrivals_ptr + (b * num_kv_heads + h) * row_tiles + tile
        merges = tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_splits - 1
        if merges:
            tl.store(arrival_ptr, 0)
            # In split order, whoever arrives last: the same bits every time.
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
            l_i = tl.zeros([BLOCK_M], tl.float32)
            # Several splits a step, as registers allow: the latencies of their loads overlap.
            SPLITS_A_STEP: tl.constexpr = 4 if NEW_AHEAD else 1
            for first in range(0, num_splits, SPLITS_A_STEP):
                for step in tl.static_range(SPLITS_A_STEP):
                    exists = in_tile & (first + step + tl.zeros([BLOCK_M], tl.int32) < num_splits)
                    theirs = scratch + (first + step) * scratch_step
                    acc_s = tl.load(
                        partial_out_ptr + theirs[:, None] * head_dim + offs_d[None, :],
                        mask=exists[:, None] & in_head[None, :], other=0.0,
                    )  # fmt: skip
                    m_s = tl.load(partial_m_ptr + theirs, mask=exists, other=-float("inf"))
                    l_s = tl.load(partial_l_ptr + theirs, mask=exists, other=0.0)
                    acc, m_i, l_i = merge_partial(acc, m_i, l_i, acc_s, m_s, l_s)
    if merges:
        out, lse = finish(acc, m_i, l_i, real & ((cached > 0) | (row_limit > 0)))
        out_row = (b64 * num_kv_heads * group_size + q_head) * q_len + query
        tl.store(
            out_ptr + out_row[:, None] * head_dim + offs_d[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=in_tile[:, None] & in_head[None, :],
        )
        if RETURN_LSE:
            tl.store(lse_ptr + out_row, lse, mask=in_tile)
