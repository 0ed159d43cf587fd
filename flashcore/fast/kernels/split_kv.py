"""Split-KV attention: several programs share the keys of one row, for decode and short chunks."""

import triton
import triton.language as tl

from flashcore.fast import tuning
from flashcore.fast.kernels.primitives import (
    APPEND,
    HAS_NEW_LENS,
    HAS_SEQ_LENS,
    LENGTHS,
    SPLIT_GROUP,
    attend_new_tile,
    attend_tile,
    known_multiple_of_8,
    known_multiples_of_8,
    load_tile,
    merge_partial,
    merge_stored,
    no_keys,
    prefetch_tile,
    report_fault,
    row_lengths,
    row_splits,
    store_output,
    store_tokens,
    take_one_key,
    tile_rows,
)

LONG_SPLIT, LONGEST_SPLIT = tl.constexpr(tuning.LONG_SPLIT), tl.constexpr(tuning.LONGEST_SPLIT)

# Sizes, strides and flags are run-time values that do not enter the cache key of compiled kernels; only
# the constexprs do. So drawing or meeting a new shape compiles nothing.
RUN_TIME_ARGUMENTS = """
    max_cached q_len num_new_keys causal_offset num_kv_heads group_size head_dim slot_limit flags
    grid_splits splits_per_program unsplit_size kv_split_size few_splits max_splits likely_split_size
    stride_seq stride_new
    stride_qb stride_qh stride_qm
    stride_kcb stride_kch stride_kcn stride_vcb stride_vch stride_vcn
    stride_knb stride_knh stride_knn stride_vnb stride_vnh stride_vnn
""".split()


@triton.jit(do_not_specialize=RUN_TIME_ARGUMENTS, do_not_specialize_on_alignment=LENGTHS)
def split_kv_attention(
    out_ptr, lse_ptr, seq_lens_out_ptr, partial_out_ptr, partial_m_ptr, partial_l_ptr, arrivals_ptr, fault_ptr,
    q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, seq_lens_ptr, new_lens_ptr,
    qk_scale,
    max_cached, q_len, num_new_keys, causal_offset, num_kv_heads, group_size, head_dim, slot_limit, flags,
    grid_splits, splits_per_program, unsplit_size, kv_split_size, few_splits, max_splits, likely_split_size,
    stride_seq, stride_new,
    stride_qb, stride_qh, stride_qm,
    stride_kcb, stride_kch, stride_kcn, stride_vcb, stride_vch, stride_vcn,
    stride_knb, stride_knh, stride_knn, stride_vnb, stride_vnh, stride_vnn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NEW: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_QUERY: tl.constexpr, SEVERAL: tl.constexpr, UNSPLIT: tl.constexpr, MASK_D: tl.constexpr, WIDE: tl.constexpr,
    MERGE_M: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Attend one tile of (query, head) rows to one split of the cached keys or several; the last to arrive merges.

    The splits of a batch row follow from its own length alone (``row_splits``), never from the batch or the capacity,
    and are merged in groups of SPLIT_GROUP, then the groups: so a row's bits do not depend on its neighbours, nor on
    how many splits a program takes. That is one, or (SEVERAL) ``splits_per_program``: a group, or no fewer than any
    row has. UNSPLIT says that no row has more than one, so that nothing is stored to be merged. The last split also
    takes the new tokens. ONE_QUERY says that q_len is 1, as in a decode step: then there is one new token, no product
    of tiles is spent on it, and the first split takes it, before its first tile.

    In a decode step nothing that waits for memory stands before the loop over the cache, so that the loads of its first
    tiles are under way as soon as the row's length is known. PREFETCH sends for the first tile even before that, where
    it is known to be, or likely: each split of ``likely_split_size`` slots, or 0 if the host cannot tell.

    Scratch: partial_out [batch, num_kv_heads, grid_splits, q_len * group_size, head_dim], partial_m and partial_l
    without the last dimension, float32, of which each program of a row fills one place, in order; arrivals [batch,
    num_kv_heads, row_tiles] int32, zero before and after.
    Grid: [ceil(grid_splits / splits_per_program) x num_kv_heads x batch, row_tiles]; programs past a row's own splits
    leave.
    """
    head_dim = known_multiple_of_8(head_dim)
    stride_qb, stride_qh, stride_qm = known_multiples_of_8(stride_qb, stride_qh, stride_qm)
    stride_kcb, stride_kch, stride_kcn = known_multiples_of_8(stride_kcb, stride_kch, stride_kcn)
    stride_vcb, stride_vch, stride_vcn = known_multiples_of_8(stride_vcb, stride_vch, stride_vcn)
    stride_knb, stride_knh, stride_knn = known_multiples_of_8(stride_knb, stride_knh, stride_knn)
    stride_vnb, stride_vnh, stride_vnn = known_multiples_of_8(stride_vnb, stride_vnh, stride_vnn)
    if not SEVERAL:
        splits_per_program = 1
    if UNSPLIT:
        grid_splits = 1
    # The programs of a row are neighbours, so that rows are finished, and merged, while others are still read.
    row_programs = tl.cdiv(grid_splits, splits_per_program)
    first_split = tl.program_id(0) % row_programs * splits_per_program
    h = tl.program_id(0) // row_programs % num_kv_heads
    b = tl.program_id(0) // row_programs // num_kv_heads
    tile = tl.program_id(1)

    # int64: batch x heads x queries x head_dim passes 2**31 for 64 prompts of 8192 tokens with 32 heads of 128.
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    kv_head = b64 * num_kv_heads + h  # of all rows
    q_ptr += b64 * stride_qb + h64 * group_size * stride_qh
    k_cache_ptr += b64 * stride_kcb + h64 * stride_kch
    v_cache_ptr += b64 * stride_vcb + h64 * stride_vch
    k_new_ptr += b64 * stride_knb + h64 * stride_knh
    v_new_ptr += b64 * stride_vnb + h64 * stride_vnh
    if PREFETCH:
        if (max_cached > 0) & ((first_split == 0) | (likely_split_size > 0)):
            likely_start = first_split * likely_split_size
            prefetch_tile(k_cache_ptr, likely_start, max_cached, head_dim, stride_kcn, BLOCK_N, BLOCK_D)
            prefetch_tile(v_cache_ptr, likely_start, max_cached, head_dim, stride_vcn, BLOCK_N, BLOCK_D)

    cached, new_keys, num_queries, lengths_ok = row_lengths(
        b, seq_lens_ptr, new_lens_ptr, stride_seq, stride_new, max_cached, q_len, num_new_keys, flags
    )
    num_splits, split_size = row_splits(
        cached, unsplit_size, kv_split_size, few_splits, max_splits, LONG_SPLIT, LONGEST_SPLIT, BLOCK_N
    )
    if UNSPLIT:
        num_splits = 1
    if first_split >= num_splits:
        return
    is_last = first_split + splits_per_program >= num_splits
    start = first_split * split_size
    stop = tl.minimum(start + splits_per_program * split_size, cached)
    query, head, in_tile, real, row_limit, _, _ = tile_rows(
        tile, num_queries, new_keys, causal_offset, q_len, group_size, BLOCK_M, ONE_QUERY
    )
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < head_dim
    q_mask = real[:, None] & in_head[None, :]
    q_ptrs = q_ptr + (head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qm)[:, None] + offs_d[None, :]
    takes_new = first_split == 0 if ONE_QUERY else is_last
    fits = lengths_ok & (cached + num_queries <= slot_limit)
    stores = takes_new & (tile == 0) & ((flags & APPEND) != 0) & fits
    slot = cached.to(tl.int64)

    if not ONE_QUERY:
        q = tl.load(q_ptrs, mask=q_mask, other=0.0)
    acc, m_i, l_i = no_keys(BLOCK_M, BLOCK_D)
    if SEVERAL:
        # Of this program: the finished splits of the current group, and the finished groups.
        group_acc, group_m, group_l = no_keys(BLOCK_M, BLOCK_D)
        row_acc, row_m, row_l = no_keys(BLOCK_M, BLOCK_D)
        split_stop = start + split_size
        group_stop = start + SPLIT_GROUP * split_size
    # Every query sees every cached slot: only the new tokens have a diagonal.
    cached_limit = tl.zeros([BLOCK_M], tl.int32) + stop
    for start_n in range(start, stop, BLOCK_N):
        if ONE_QUERY:
            if start_n == 0:
                acc, m_i, l_i = take_one_key(
                    acc, m_i, l_i, q_ptrs, q_mask, k_new_ptr + offs_d, v_new_ptr + offs_d, in_head, qk_scale, new_keys,
                    k_cache_ptr + slot * stride_kcn + offs_d, v_cache_ptr + slot * stride_vcn + offs_d, stores,
                )  # fmt: skip
        if SEVERAL:
            if start_n == split_stop:
                group_acc, group_m, group_l = merge_partial(group_acc, group_m, group_l, acc, m_i, l_i)
                acc, m_i, l_i = no_keys(BLOCK_M, BLOCK_D)
                split_stop += split_size
                if start_n == group_stop:
                    row_acc, row_m, row_l = merge_partial(row_acc, row_m, row_l, group_acc, group_m, group_l)
                    group_acc, group_m, group_l = no_keys(BLOCK_M, BLOCK_D)
                    group_stop += SPLIT_GROUP * split_size
        if ONE_QUERY:
            # With every tile, at the offset 0: before the loop, it would be waited for before any tile is loaded.
            q = tl.load(q_ptrs + tl.minimum(start_n, 0), mask=q_mask, other=0.0)
        acc, m_i, l_i = attend_tile(
            acc, m_i, l_i, q, k_cache_ptr, v_cache_ptr, start_n, stop, cached_limit, qk_scale, head_dim,
            stride_kcn, stride_vcn, BLOCK_N, BLOCK_D, True, MASK_D, False, WIDE, True,
        )  # fmt: skip

    # The program that takes the new tokens of its kv head stores them, too; one a batch row writes the row's length.
    if takes_new & (tile == 0) & (h == 0):
        if flags & APPEND:
            tl.store(seq_lens_out_ptr + b, tl.where(fits, cached + num_queries, cached))
            report_fault(fault_ptr, b, lengths_ok, fits)
        elif flags & (HAS_SEQ_LENS | HAS_NEW_LENS):
            report_fault(fault_ptr, b, lengths_ok, lengths_ok)
    if ONE_QUERY:
        if cached == 0:
            acc, m_i, l_i = take_one_key(
                acc, m_i, l_i, q_ptrs, q_mask, k_new_ptr + offs_d, v_new_ptr + offs_d, in_head, qk_scale, new_keys,
                k_cache_ptr + offs_d, v_cache_ptr + offs_d, stores,
            )  # fmt: skip
    elif is_last:
        new_n = tl.arange(0, BLOCK_NEW)
        if WIDE:
            new_n = new_n.to(tl.int64)
        k_new = load_tile(k_new_ptr, new_n, offs_d, stride_knn, new_keys, head_dim, True, MASK_D, False)
        v_new = load_tile(v_new_ptr, new_n, offs_d, stride_vnn, new_keys, head_dim, True, MASK_D, False)
        acc, m_i, l_i = attend_new_tile(acc, m_i, l_i, q, k_new, v_new, row_limit, qk_scale, BLOCK_NEW)
        if stores:
            store_tokens(
                k_cache_ptr, v_cache_ptr, cached, k_new, v_new, num_queries, head_dim,
                stride_kcn, stride_vcn, BLOCK_NEW, BLOCK_D,
            )  # fmt: skip

    has_whole_row = splits_per_program >= num_splits
    if SEVERAL:
        if num_splits > 1:
            acc, m_i, l_i = merge_partial(group_acc, group_m, group_l, acc, m_i, l_i)
            if has_whole_row:
                acc, m_i, l_i = merge_partial(row_acc, row_m, row_l, acc, m_i, l_i)
    if has_whole_row:
        out_row = (kv_head * group_size + head) * q_len + query
        store_output(
            out_ptr, lse_ptr, acc, m_i, l_i, out_row, in_tile, real & ((cached > 0) | (row_limit > 0)), head_dim,
            in_head, flags,
        )  # fmt: skip
    else:
        num_partials = tl.cdiv(num_splits, splits_per_program)
        rows = tl.arange(0, BLOCK_M)
        # Where this row's first partial result is kept; the others follow, a step apart.
        step = q_len * group_size
        scratch = kv_head * grid_splits * step + tile * BLOCK_M
        in_partial = rows[:, None] * head_dim + offs_d[None, :]
        partial_mask = in_tile[:, None] & in_head[None, :]
        mine = scratch + first_split // splits_per_program * step
        tl.store(partial_out_ptr + mine * head_dim + in_partial, acc, mask=partial_mask)
        tl.store(partial_m_ptr + mine + rows, m_i, mask=in_tile)
        tl.store(partial_l_ptr + mine + rows, l_i, mask=in_tile)
        # Every thread's stores come before the arrival that publishes them.
        tl.debug_barrier()
        arrival_ptr = arrivals_ptr + kv_head * tl.num_programs(1) + tile
        if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_partials - 1:
            tl.store(arrival_ptr, 0)
            # A tile of about as many rows as there are: a quarter of the work where few heads share a kv head.
            query_m, head_m, in_tile_m, real_m, row_limit_m, _, _ = tile_rows(
                tile, num_queries, new_keys, causal_offset, q_len, group_size, MERGE_M, ONE_QUERY
            )
            acc_m, m_m, l_m = merge_stored(
                num_partials, partial_out_ptr, partial_m_ptr, partial_l_ptr, scratch, step, head_dim, in_tile_m,
                in_head, MERGE_M, BLOCK_D, SEVERAL,
            )  # fmt: skip
            out_row_m = (kv_head * group_size + head_m) * q_len + query_m
            store_output(
                out_ptr, lse_ptr, acc_m, m_m, l_m, out_row_m, in_tile_m, real_m & ((cached > 0) | (row_limit_m > 0)),
                head_dim, in_head, flags,
            )  # fmt: skip
