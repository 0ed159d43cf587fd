"""Attention without splits: one program a tile of queries, for prefill and long chunks."""

import triton
import triton.language as tl

from flashcore.fast.kernels.primitives import (
    APPEND,
    HAS_NEW_LENS,
    HAS_SEQ_LENS,
    LENGTHS,
    append_tokens,
    attend_segment,
    known_multiple_of_8,
    known_multiples_of_8,
    report_fault,
    row_lengths,
    store_output,
    tile_rows,
)

# Sizes, strides and flags are run-time values that do not enter the cache key of compiled kernels; only
# the constexprs do. So drawing or meeting a new shape compiles nothing.
RUN_TIME_ARGUMENTS = """
    max_cached q_len num_new_keys causal_offset num_kv_heads group_size head_dim slot_limit row_tiles flags
    stride_seq stride_new
    stride_qb stride_qh stride_qm
    stride_kcb stride_kch stride_kcn stride_vcb stride_vch stride_vcn
    stride_knb stride_knh stride_knn stride_vnb stride_vnh stride_vnn
""".split()


@triton.jit(do_not_specialize=RUN_TIME_ARGUMENTS, do_not_specialize_on_alignment=LENGTHS)
def prefill_attention(
    out_ptr, lse_ptr, seq_lens_out_ptr, fault_ptr,
    q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, seq_lens_ptr, new_lens_ptr,
    qk_scale,
    max_cached, q_len, num_new_keys, causal_offset, num_kv_heads, group_size, head_dim, slot_limit, row_tiles, flags,
    stride_seq, stride_new,
    stride_qb, stride_qh, stride_qm,
    stride_kcb, stride_kch, stride_kcn, stride_vcb, stride_vch, stride_vcn,
    stride_knb, stride_knh, stride_knn, stride_vnb, stride_vnh, stride_vnn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Attend one tile of BLOCK_M (query, head) rows to all the keys it sees; append the tile's share of new tokens.

    Grid: row_tiles x num_kv_heads x batch, in one dimension (the y and z dimensions of a grid end at 65,535).
    """
    head_dim = known_multiple_of_8(head_dim)
    stride_kcb, stride_kch, stride_kcn = known_multiples_of_8(stride_kcb, stride_kch, stride_kcn)
    stride_vcb, stride_vch, stride_vcn = known_multiples_of_8(stride_vcb, stride_vch, stride_vcn)
    stride_knb, stride_knh, stride_knn = known_multiples_of_8(stride_knb, stride_knh, stride_knn)
    stride_vnb, stride_vnh, stride_vnn = known_multiples_of_8(stride_vnb, stride_vnh, stride_vnn)
    pid = tl.program_id(0)
    # With a causal mask later tiles see more keys: start them first.
    tile = row_tiles - 1 - pid % row_tiles
    h = pid // row_tiles % num_kv_heads
    b = pid // row_tiles // num_kv_heads

    cached, new_keys, num_queries, lengths_ok = row_lengths(
        b, seq_lens_ptr, new_lens_ptr, stride_seq, stride_new, max_cached, q_len, num_new_keys, flags
    )
    query, head, in_tile, real, row_limit, common_limit, new_stop = tile_rows(
        tile, num_queries, new_keys, causal_offset, q_len, group_size, BLOCK_M, False
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

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if tile * BLOCK_M // group_size < num_queries:
        # Every query sees every cached slot: only the new tokens have a diagonal.
        acc, m_i, l_i = attend_segment(
            acc, m_i, l_i, q, k_cache_ptr, v_cache_ptr, 0, cached, cached,
            tl.zeros([BLOCK_M], tl.int32) + cached, qk_scale, head_dim,
            stride_kcn, stride_vcn, BLOCK_N, BLOCK_D, MASK_D, False, WIDE,
        )  # fmt: skip
        acc, m_i, l_i = attend_segment(
            acc, m_i, l_i, q, k_new_ptr, v_new_ptr, 0, new_stop, common_limit, row_limit, qk_scale, head_dim,
            stride_knn, stride_vnn, BLOCK_N, BLOCK_D, MASK_D, True, WIDE,
        )  # fmt: skip

    out_row = (b64 * num_kv_heads * group_size + q_head) * q_len + query
    store_output(
        out_ptr, lse_ptr, acc, m_i, l_i, out_row, in_tile, real & ((cached > 0) | (row_limit > 0)), head_dim, in_head,
        flags,
    )  # fmt: skip

    # One program a batch row writes its length; each tile copies the new tokens whose first row it holds.
    fits = lengths_ok & (cached + num_queries <= slot_limit)
    if flags & APPEND:
        if h == 0 and tile == 0:
            tl.store(seq_lens_out_ptr + b, tl.where(fits, cached + num_queries, cached))
            report_fault(fault_ptr, b, lengths_ok, fits)
        if fits:
            first_token = (tile * BLOCK_M + group_size - 1) // group_size
            last_token = tl.minimum((tile * BLOCK_M + BLOCK_M + group_size - 1) // group_size, num_queries)
            append_tokens(
                k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, cached, first_token, last_token, head_dim,
                stride_kcn, 1, stride_vcn, 1, stride_knn, 1, stride_vnn, 1,
                BLOCK_N, BLOCK_D,
            )  # fmt: skip
    elif flags & (HAS_SEQ_LENS | HAS_NEW_LENS):
        if (tile == 0) & (h == 0):
            report_fault(fault_ptr, b, lengths_ok, lengths_ok)
