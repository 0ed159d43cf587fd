"""Append on its own: for caches whose strides the attention kernels do not take (see ``attention_production``)."""

import triton
import triton.language as tl

from flashcore.fast.kernels.primitives import LENGTHS, append_tokens, report_fault, row_lengths

RUN_TIME_ARGUMENTS = """
    max_cached q_len num_kv_heads head_dim slot_limit token_tiles flags stride_seq stride_new
    stride_kcb stride_kch stride_kcn stride_kcd stride_vcb stride_vch stride_vcn stride_vcd
    stride_knb stride_knh stride_knn stride_knd stride_vnb stride_vnh stride_vnn stride_vnd
""".split()


@triton.jit(do_not_specialize=RUN_TIME_ARGUMENTS, do_not_specialize_on_alignment=LENGTHS)
def append_new_tokens(
    seq_lens_out_ptr, fault_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, seq_lens_ptr, new_lens_ptr,
    max_cached, q_len, num_kv_heads, head_dim, slot_limit, token_tiles, flags, stride_seq, stride_new,
    stride_kcb, stride_kch, stride_kcn, stride_kcd, stride_vcb, stride_vch, stride_vcn, stride_vcd,
    stride_knb, stride_knh, stride_knn, stride_knd, stride_vnb, stride_vnh, stride_vnn, stride_vnd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy one tile of new tokens of one (batch row, kv head) to its slots, whatever the strides.

    Grid: token_tiles x num_kv_heads x batch, in one dimension.
    """
    pid = tl.program_id(0)
    tile = pid % token_tiles
    h = pid // token_tiles % num_kv_heads
    b = pid // token_tiles // num_kv_heads
    cached, _, num_tokens, lengths_ok = row_lengths(
        b, seq_lens_ptr, new_lens_ptr, stride_seq, stride_new, max_cached, q_len, q_len, flags
    )
    fits = lengths_ok & (cached + num_tokens <= slot_limit)
    if h == 0 and tile == 0:
        tl.store(seq_lens_out_ptr + b, tl.where(fits, cached + num_tokens, cached))
        report_fault(fault_ptr, b, lengths_ok, fits)
    if fits:
        b64 = b.to(tl.int64)
        h64 = h.to(tl.int64)
        append_tokens(
            k_cache_ptr + b64 * stride_kcb + h64 * stride_kch, v_cache_ptr + b64 * stride_vcb + h64 * stride_vch,
            k_new_ptr + b64 * stride_knb + h64 * stride_knh, v_new_ptr + b64 * stride_vnb + h64 * stride_vnh,
            cached, tile * BLOCK_N, tl.minimum(tile * BLOCK_N + BLOCK_N, num_tokens), head_dim,
            stride_kcn, stride_kcd, stride_vcn, stride_vcd, stride_knn, stride_knd, stride_vnn, stride_vnd,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
