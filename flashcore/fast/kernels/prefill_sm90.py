"""Prefill on Hopper: the softmax of one tile overlaps the matrix products of others, inside a program.

A program is one warp that copies tiles of keys and values into a ring in shared memory, and CONSUMERS warpgroups with
64 (query, head) rows each. A consumer issues the product of queries and the next keys, and that of the weights before
with their values, both asynchronously; while the second runs, it takes the softmax of the first. The arithmetic,
rounding by rounding, is that of ``online_softmax_update``.

Written in Gluon, Triton's language a level below: Triton itself waits for each product at once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import PropagateNan, debug_barrier

from flashcore.fast.kernels import prefill, primitives
from flashcore.fast.kernels.primitives import APPEND, HAS_NEW_LENS, HAS_SEQ_LENS, LENGTHS, RETURN_LSE

row_lengths = gluon.jit(primitives.row_lengths.fn)
report_fault = gluon.jit(primitives.report_fault.fn)
known_multiple_of_8 = gluon.jit(primitives.known_multiple_of_8.fn)

# Triton 3.9, with which CI compiles this, has other names than 3.6.
copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_elements = (
    async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
)  # fmt: skip

ROWS = gl.constexpr(64)
"""Rows of a consumer: those of a matrix instruction of one warpgroup."""

ALL = gl.constexpr(PropagateNan.ALL)

FLAG = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""Of one number that all threads have."""


@gluon.constexpr_function
def mma_layout(columns):
    """How a product [ROWS, columns] lies in the registers of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def io_layout(rows, columns, num_warps=4):
    """16-bit tiles in global memory: ``rows`` that follow each other a thread, 16 bytes of each."""
    return gl.BlockedLayout([rows, 8], [256 // columns, columns // 8], [num_warps, 1], [1, 0])


@gluon.jit
def maximum_or_nan(a, b):
    """For reductions: NaN where either is."""
    return gl.maximum(a, b, propagate_nan=ALL)


@gluon.jit
def query_and_head(first_row, group_size, LAYOUT: gl.constexpr):
    """Which query and which head of the group rows ``first_row`` and following are: [ROWS] each, in LAYOUT.

    Row = query * group_size + head. One division, and a product for each row: floor(x / g) is (x * m) >> 31 for the
    least m with m * g >= 2**31, as long as x * g < 2**31.
    """
    first_query = first_row // group_size
    row = first_row - first_query * group_size + gl.arange(0, ROWS, LAYOUT)
    multiplier = (2147483647 // group_size).to(gl.int64) + 1
    queries = ((row.to(gl.int64) * multiplier) >> 31).to(gl.int32)
    return first_query + queries, row - queries * group_size


@gluon.jit
def fold_logits(logits, m_i, l_i, limit, qk_scale, MASK: gl.constexpr):
    """The softmax of one tile, up to the product with its values; see ``online_softmax_update``.

    logits       [ROWS, BLOCK_N]  float32, before scaling
    m_i, l_i     [ROWS]           float32, running maximum and sum
    limit        [ROWS]           with MASK, row i sees the first limit[i] keys of the tile

    Returns the weights, the new maximum and sum, and the factor of everything before.
    """
    logits = logits * qk_scale
    if MASK:
        keys = gl.arange(0, logits.shape[1], gl.SliceLayout(0, logits.type.layout))
        logits = gl.where(keys[None, :] < limit[:, None], logits, -float("inf"))
    m_new = gl.maximum(m_i, gl.max(logits, axis=1))
    m_base = gl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = gl.exp2(m_i - m_base)
    p = gl.exp2(logits - m_base[:, None])
    return p, m_new, l_i * alpha + gl.sum(p, axis=1), alpha


@gluon.jit
def fold_tiles(
    acc, m_i, l_i, p, queries, ring, first, stop, limit, qk_scale,
    MASK: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fold tiles ``[first, stop)`` of the ring; p [ROWS, BLOCK_N] are the weights of the tile before, not yet folded.

    With MASK, row i sees the keys below ``limit[i]``, counted from tile 0. The product of weights and values is always
    one tile late, and runs beside the softmax of the next.
    """
    k_s, v_s, k_full, v_full, k_free, v_free = ring
    LOGITS: gl.constexpr = mma_layout(BLOCK_N)
    OUT: gl.constexpr = mma_layout(BLOCK_D)
    for tile in range(first, stop):
        slot, before, phase = tile % STAGES, (tile - 1) % STAGES, tile // STAGES & 1
        mbarrier.wait(k_full.index(slot), phase)
        k_t = k_s.index(slot).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
        logits = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
        logits = warpgroup_mma(queries, k_t, logits, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, v_s.index(before).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
        logits = warpgroup_mma_wait(1, deps=(logits,))
        mbarrier.arrive(k_free.index(slot), count=1)
        weights, m_i, l_i, alpha = fold_logits(logits, m_i, l_i, limit - tile * BLOCK_N, qk_scale, MASK)
        weights = gl.convert_layout(weights.to(k_s.dtype), gl.DotOperandLayout(0, OUT, 2))
        # The softmax has to run before the next wait, but the compiler moves behind it what it can. So the weights pass
        # through it, and the loop that waits for these values ends a block of instructions before it.
        mbarrier.wait(v_full.index(slot), phase)
        acc, _, p = warpgroup_mma_wait(0, deps=(acc, p, weights))
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    return acc, m_i, l_i, p


@gluon.jit
def head_pointer(ptr, strides, b64, h64):
    """Pointer to one (batch row, kv head) of a tensor, and the stride of its tokens."""
    ptr += b64 * known_multiple_of_8(strides[0]) + h64 * known_multiple_of_8(strides[1])
    return ptr, known_multiple_of_8(strides[2])


@gluon.jit
def tile_pointers(ptr, start, stride, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, IO: gl.constexpr):
    """Pointers to [BLOCK_N, BLOCK_D] elements of rows ``start`` and following, in 64 bits."""
    rows = (start + gl.arange(0, BLOCK_N, gl.SliceLayout(1, IO))).to(gl.int64)
    return ptr + (rows * stride)[:, None] + gl.arange(0, BLOCK_D, gl.SliceLayout(0, IO))[None, :]


@gluon.jit
def copy_tile(cache_desc, new_desc, segment, b, h, start_n, tile_s, barrier):
    """Have a tile of a segment copied to shared memory; ``barrier`` will tell when it has come."""
    mbarrier.expect(barrier, cache_desc.block_type.nbytes)
    if segment == 0:
        copy_box(cache_desc, [b, h, start_n, 0], barrier, tile_s)
    else:
        copy_box(new_desc, [b, h, start_n, 0], barrier, tile_s)


@gluon.jit
def fetch(cache_desc, new_desc, segment, b, h, start_n, tile_s, landed, phase):
    """Copy a tile to shared memory that the caller alone uses, and wait for it."""
    fence_async_shared()
    debug_barrier()
    copy_tile(cache_desc, new_desc, segment, b, h, start_n, tile_s, landed)
    mbarrier.wait(landed, phase)


@gluon.jit
def separate_nonfinite_values(v_s, marks_s, valid, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """Replace values by 0 that are not finite, or hidden from ``valid`` on; marks are 1 for the former, 0 elsewhere."""
    IO: gl.constexpr = io_layout(1, BLOCK_D)
    PIECE: gl.constexpr = 32
    for piece in gl.static_range(BLOCK_N // PIECE):
        piece_s = v_s.slice(piece * PIECE, PIECE)
        v = piece_s.load(IO)
        rows = piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, IO))
        inside = rows[:, None] < valid
        finite = gl.abs(v.to(gl.float32)) < float("inf")
        piece_s.store(gl.where(inside & finite, v, 0.0))
        marks_s.slice(piece * PIECE, PIECE).store(gl.where(inside & (finite == 0), 1.0, 0.0).to(v.dtype))
    fence_async_shared()
    debug_barrier()


@gluon.jit
def copy_tokens(
    cache_ptr, new_ptr, strides_cache, strides_new, b64, h64, first_slot, start, stop, BLOCK_D: gl.constexpr
):  # fmt: skip
    """Copy new tokens ``[start, stop)`` bit for bit to slots ``first_slot + token``."""
    IO: gl.constexpr = io_layout(1, BLOCK_D)
    cache_ptr, stride_cache = head_pointer(cache_ptr, strides_cache, b64, h64)
    new_ptr, stride_new = head_pointer(new_ptr, strides_new, b64, h64)
    offs_n = gl.arange(0, ROWS, gl.SliceLayout(1, IO))
    for token in range(start, stop, ROWS):
        inside = (token + offs_n < stop)[:, None]
        tokens = gl.load(tile_pointers(new_ptr, token, stride_new, ROWS, BLOCK_D, IO), mask=inside)
        gl.store(tile_pointers(cache_ptr, first_slot + token, stride_cache, ROWS, BLOCK_D, IO), tokens, mask=inside)


@gluon.jit
def load_queries(q_s, q_ptr, strides, b64, h64, first_row, group_size, num_queries, BLOCK_D: gl.constexpr):
    """Copy the queries of rows ``first_row`` and following to shared memory; 0 where there is none."""
    IO: gl.constexpr = io_layout(1, BLOCK_D)
    query, head = query_and_head(first_row, group_size, gl.SliceLayout(1, IO))
    q_ptr += b64 * known_multiple_of_8(strides[0]) + h64 * group_size * known_multiple_of_8(strides[1])
    offset = head.to(gl.int64) * known_multiple_of_8(strides[1]) + query.to(gl.int64) * known_multiple_of_8(strides[2])
    offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, IO))
    q_s.store(gl.load(q_ptr + offset[:, None] + offs_d[None, :], mask=(query < num_queries)[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def limits(first_row, group_size, num_queries, new_keys, causal_offset, LAYOUT: gl.constexpr):
    """How many new keys each row sees, [ROWS], -1 where there is no query; and how many all rows see."""
    query, _ = query_and_head(first_row, group_size, LAYOUT)
    row_limit = gl.minimum(gl.maximum(query + causal_offset + 1, 0), new_keys)
    common_limit = gl.minimum(gl.maximum(first_row // group_size + causal_offset + 1, 0), new_keys)
    return gl.where(query < num_queries, row_limit, -1), common_limit


@gluon.jit
def store_rows(
    acc, m_i, l_i, row_limit, cached, q_s, out_ptr, lse_ptr, sizes, b64, h64, first_row, BLOCK_D: gl.constexpr
):  # fmt: skip
    """Divide by the sum of weights, as ``finish`` does, and store output and LSE; ``q_s`` is overwritten."""
    q_len, _, num_kv_heads, group_size, flags = sizes
    # Rows that follow each other: the addresses are others than those of the queries, which would stay in registers.
    IO: gl.constexpr = io_layout(BLOCK_D // 16, BLOCK_D)
    LSE_IO: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    sees_keys = (row_limit > 0) | ((row_limit == 0) & (cached > 0))
    # Rows without keys have the sum 0, those without a query have met keys that are not theirs: both become 0.
    out = acc / gl.convert_layout(gl.where(sees_keys, l_i, 1.0), OUT_ROW)[:, None]
    out = gl.where(gl.convert_layout(sees_keys, OUT_ROW)[:, None], out, 0.0)
    q_s.store(out.to(q_s.dtype))
    query, head = query_and_head(first_row, group_size, gl.SliceLayout(1, IO))
    first_out_row = (b64 * num_kv_heads + h64) * group_size * q_len
    offset = (head * q_len + query).to(gl.int64) * BLOCK_D
    offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, IO))
    out_ptr += first_out_row * BLOCK_D
    gl.store(out_ptr + offset[:, None] + offs_d[None, :], q_s.load(IO), mask=(query < q_len)[:, None])
    if flags & RETURN_LSE:
        ln_2: gl.constexpr = 0.6931471805599453
        lse = gl.where(sees_keys, (m_i + gl.log2(l_i)) * ln_2, -float("inf"))
        lse_query, lse_head = query_and_head(first_row, group_size, LSE_IO)
        gl.store(
            lse_ptr + first_out_row + lse_head * q_len + lse_query, gl.convert_layout(lse, LSE_IO),
            mask=lse_query < q_len,
        )  # fmt: skip


@gluon.jit
def consume(
    pointers, qk_scale, sizes, strides, shared, program,
    CONSUMER: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attend the 64 rows of one consumer to all tiles of the ring, and append the new tokens whose first row is here.

    The tuples are those of ``prefill_attention_sm90``.
    """
    out_ptr, lse_ptr, q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr = pointers
    _, causal_offset, _, group_size, _ = sizes
    stride_q, stride_kc, stride_vc, stride_kn, stride_vn = strides
    q_s, ring, nonfinite_s = shared
    b, h, first_row, cached, new_keys, num_queries, new_stop, append_stop = program
    k_s, v_s, k_full, v_full, k_free, _ = ring
    LOGITS: gl.constexpr = mma_layout(BLOCK_N)
    OUT: gl.constexpr = mma_layout(BLOCK_D)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    # int64: batch x heads x queries x head_dim passes 2**31 for 64 prompts of 8192 tokens with 32 heads of 128.
    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    q_s = q_s.index(CONSUMER)
    first_row += CONSUMER * ROWS
    load_queries(q_s, q_ptr, stride_q, b64, h64, first_row, group_size, num_queries, BLOCK_D)
    row_limit, common_limit = limits(first_row, group_size, num_queries, new_keys, causal_offset, ROW)
    # A product of 64 rows and 64 keys that reads both from shared memory takes all that this can deliver.
    queries = q_s
    if IN_REGISTERS:
        queries = q_s.load(gl.DotOperandLayout(0, LOGITS, 2))

    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, OUT)
    m_i = gl.full([ROWS], -float("inf"), gl.float32, ROW)
    l_i = gl.zeros([ROWS], gl.float32, ROW)
    cached_tiles = gl.cdiv(cached, BLOCK_N)
    num_tiles = cached_tiles + gl.cdiv(new_stop, BLOCK_N)
    if num_tiles > 0:
        mbarrier.wait(k_full.index(0), 0)
        k_t = k_s.index(0).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
        logits = warpgroup_mma(queries, k_t, gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS), use_acc=False)
        mbarrier.arrive(k_free.index(0), count=1)
        limit = gl.where(cached > 0, cached, row_limit)
        weights, m_i, l_i, _alpha = fold_logits(logits, m_i, l_i, limit, qk_scale, True)
        p = gl.convert_layout(weights.to(k_s.dtype), gl.DotOperandLayout(0, OUT, 2))
        # Cached keys are seen by all rows, new ones up to the diagonal: of each, the tiles that all rows see whole come
        # first, without masks.
        mbarrier.wait(v_full.index(0), 0)
        for segment in range(2):
            first = gl.where(segment == 0, 1, gl.maximum(cached_tiles, 1))
            stop = gl.where(segment == 0, cached_tiles, num_tiles)
            whole = gl.where(segment == 0, cached // BLOCK_N, cached_tiles + common_limit // BLOCK_N)
            whole = gl.maximum(gl.minimum(whole, stop), first)
            limit = gl.where(segment == 0, cached, row_limit + cached_tiles * BLOCK_N)
            acc, m_i, l_i, p = fold_tiles(
                acc, m_i, l_i, p, queries, ring, first, whole, limit, qk_scale, False, BLOCK_N, BLOCK_D, STAGES
            )
            acc, m_i, l_i, p = fold_tiles(
                acc, m_i, l_i, p, queries, ring, whole, stop, limit, qk_scale, True, BLOCK_N, BLOCK_D, STAGES
            )
        last = (num_tiles - 1) % STAGES
        acc = warpgroup_mma(p, v_s.index(last).reshape([BLOCK_N, BLOCK_D]), acc)

    # A value that is not finite makes its column of every row that has a weight for it, be it 0, not finite.
    largest = gl.reduce(gl.reduce(gl.abs(acc), 1, maximum_or_nan), 0, maximum_or_nan)
    nonfinite = gl.where(largest < float("inf"), 0, 1)
    nonfinite_s.index(CONSUMER).store(gl.zeros([1], gl.int32, FLAG) + nonfinite)
    store_rows(acc, m_i, l_i, row_limit, cached, q_s, out_ptr, lse_ptr, sizes, b64, h64, first_row, BLOCK_D)
    first_token = (first_row + group_size - 1) // group_size
    last_token = gl.minimum((first_row + ROWS + group_size - 1) // group_size, append_stop)
    if first_token < last_token:
        copy_tokens(
            k_cache_ptr, k_new_ptr, stride_kc, stride_kn, b64, h64, cached, first_token, last_token, BLOCK_D
        )  # fmt: skip
        copy_tokens(
            v_cache_ptr, v_new_ptr, stride_vc, stride_vn, b64, h64, cached, first_token, last_token, BLOCK_D
        )  # fmt: skip


@gluon.jit
def attend_again(
    pointers, descriptors, qk_scale, sizes, strides, shared, program, consumer, landed,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Attend the rows of a consumer that met values that are not finite; keep these from rows that do not see them.

    The same products in the same order as the consumer's, but of values without such elements; another product counts
    those that a row sees, and makes what they reach NaN.
    """
    out_ptr, lse_ptr, q_ptr, _, _, _, _ = pointers
    _, causal_offset, _, group_size, _ = sizes
    q_s, ring, _ = shared
    b, h, first_row, cached, new_keys, num_queries, new_stop, _ = program
    k_cache_desc, v_cache_desc, k_new_desc, v_new_desc = descriptors
    LOGITS: gl.constexpr = mma_layout(BLOCK_N)
    OUT: gl.constexpr = mma_layout(BLOCK_D)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    q_s = q_s.index(consumer)
    first_row += consumer * ROWS
    debug_barrier()
    load_queries(q_s, q_ptr, strides[0], b64, h64, first_row, group_size, num_queries, BLOCK_D)
    row_limit, _ = limits(first_row, group_size, num_queries, new_keys, causal_offset, ROW)
    k_s, v_s = ring[0].index(0), ring[1].index(0)
    k_tile, v_tile = k_s.reshape([BLOCK_N, BLOCK_D]), v_s.reshape([BLOCK_N, BLOCK_D])
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LOGITS))
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, OUT)
    m_i = gl.full([ROWS], -float("inf"), gl.float32, ROW)
    l_i = gl.zeros([ROWS], gl.float32, ROW)
    for segment in range(2):
        stop = gl.where(segment == 0, cached, new_stop)
        for start_n in range(0, stop, BLOCK_N):
            limit = gl.where(segment == 0, cached, row_limit) - start_n
            fetch(v_cache_desc, v_new_desc, segment, b, h, start_n, v_s, landed, 0)
            separate_nonfinite_values(v_tile, k_tile, stop - start_n, BLOCK_N, BLOCK_D)
            visible = gl.where(keys[None, :] < limit[:, None], 1.0, 0.0).to(k_s.dtype)
            seen = gl.zeros([ROWS, BLOCK_D], gl.float32, OUT)
            seen = warpgroup_mma(gl.convert_layout(visible, WEIGHTS), k_tile, seen, use_acc=False)
            acc = gl.where(seen > 0, float("nan"), acc)
            fetch(k_cache_desc, k_new_desc, segment, b, h, start_n, k_s, landed, 1)
            logits = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
            logits = warpgroup_mma(q_s, k_tile.permute((1, 0)), logits, use_acc=False)
            weights, m_i, l_i, alpha = fold_logits(logits, m_i, l_i, limit, qk_scale, True)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
            acc = warpgroup_mma(gl.convert_layout(weights.to(k_s.dtype), WEIGHTS), v_tile, acc)
    store_rows(acc, m_i, l_i, row_limit, cached, q_s, out_ptr, lse_ptr, sizes, b64, h64, first_row, BLOCK_D)


@gluon.jit
def copy_values_below(stop, v_s, v_ptr, strides, b, h, start_n, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """Copy the values of keys ``[start_n, stop)``, less than a tile, to shared memory, and 0 for the rest of it.

    Hidden values have weight 0, but 0 * NaN is NaN.
    """
    PIECE: gl.constexpr = 8
    IO: gl.constexpr = io_layout(1, BLOCK_D, 1)
    v_ptr, stride_vn = head_pointer(v_ptr, strides, b.to(gl.int64), h.to(gl.int64))
    for piece in gl.static_range(BLOCK_N // PIECE):
        start = start_n + piece * PIECE
        inside = start + gl.arange(0, PIECE, gl.SliceLayout(1, IO)) < stop
        pointers = tile_pointers(v_ptr, start, stride_vn, PIECE, BLOCK_D, IO)
        copy_elements(v_s.slice(piece * PIECE, PIECE), pointers, inside[:, None])
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()


@gluon.jit
def produce(
    pointers, descriptors, strides, shared, program,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the tiles of both segments to the ring, one after the other, whenever there is room."""
    _, _, _, _, v_cache_ptr, _, v_new_ptr = pointers
    _, _, stride_vc, _, stride_vn = strides
    _, ring, _ = shared
    b, h, _, cached, _, _, new_stop, _ = program
    k_s, v_s, k_full, v_full, k_free, v_free = ring
    k_cache_desc, v_cache_desc, k_new_desc, v_new_desc = descriptors
    cached_tiles = gl.cdiv(cached, BLOCK_N)
    for tile in range(cached_tiles + gl.cdiv(new_stop, BLOCK_N)):
        segment = gl.where(tile < cached_tiles, 0, 1)
        start_n = gl.where(segment == 0, tile, tile - cached_tiles) * BLOCK_N
        stop = gl.where(segment == 0, cached, new_stop)
        slot, free = tile % STAGES, (tile // STAGES & 1) ^ 1
        mbarrier.wait(k_free.index(slot), free)
        copy_tile(k_cache_desc, k_new_desc, segment, b, h, start_n, k_s.index(slot), k_full.index(slot))
        mbarrier.wait(v_free.index(slot), free)
        if start_n + BLOCK_N <= stop:
            copy_tile(v_cache_desc, v_new_desc, segment, b, h, start_n, v_s.index(slot), v_full.index(slot))
        else:
            tile_s = v_s.index(slot).reshape([BLOCK_N, BLOCK_D])
            if segment == 0:
                copy_values_below(cached, tile_s, v_cache_ptr, stride_vc, b, h, start_n, BLOCK_N, BLOCK_D)
            else:
                copy_values_below(new_stop, tile_s, v_new_ptr, stride_vn, b, h, start_n, BLOCK_N, BLOCK_D)
            mbarrier.arrive(v_full.index(slot), count=1)


@gluon.jit(do_not_specialize=prefill.RUN_TIME_ARGUMENTS, do_not_specialize_on_alignment=LENGTHS)
def prefill_attention_sm90(
    out_ptr, lse_ptr, seq_lens_out_ptr, fault_ptr,
    q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, seq_lens_ptr, new_lens_ptr,
    qk_scale,
    max_cached, q_len, num_new_keys, causal_offset, num_kv_heads, group_size, head_dim, slot_limit, row_tiles, flags,  # noqa: ARG001
    stride_seq, stride_new,
    stride_qb, stride_qh, stride_qm,
    stride_kcb, stride_kch, stride_kcn, stride_vcb, stride_vch, stride_vcn,
    stride_knb, stride_knh, stride_knn, stride_vnb, stride_vnh, stride_vnn,
    k_cache_desc, v_cache_desc, k_new_desc, v_new_desc,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """What ``prefill_attention`` does, for 64 * CONSUMERS rows a program; head_dim is BLOCK_D.

    The four descriptors say what the pointers and strides beside them say, for copies by hardware.
    Grid: row_tiles x num_kv_heads x batch, in one dimension.
    """
    pid = gl.program_id(0)
    # With a causal mask later tiles see more keys: start them first.
    tile = row_tiles - 1 - pid % row_tiles
    h = pid // row_tiles % num_kv_heads
    b = pid // row_tiles // num_kv_heads
    cached, new_keys, num_queries, lengths_ok = row_lengths(
        b, seq_lens_ptr, new_lens_ptr, stride_seq, stride_new, max_cached, q_len, num_new_keys, flags
    )
    fits = lengths_ok & (cached + num_queries <= slot_limit)
    if (tile == 0) & (h == 0):
        if flags & APPEND:
            gl.store(seq_lens_out_ptr + b, gl.where(fits, cached + num_queries, cached))
            report_fault(fault_ptr, b, lengths_ok, fits)
        elif flags & (HAS_SEQ_LENS | HAS_NEW_LENS):
            report_fault(fault_ptr, b, lengths_ok, lengths_ok)

    # A program of padding alone has no tiles.
    first_row = tile * (CONSUMERS * ROWS)
    last = gl.minimum((first_row + CONSUMERS * ROWS - 1) // group_size, num_queries - 1)
    new_stop = gl.minimum(gl.maximum(last + causal_offset + 1, 0), new_keys)
    has_queries = first_row // group_size < num_queries
    attended = gl.where(has_queries, cached, 0)
    new_stop = gl.where(has_queries, new_stop, 0)
    append_stop = gl.where(fits & ((flags & APPEND) != 0), num_queries, 0)

    dtype: gl.constexpr = k_cache_desc.dtype
    q_s = gl.allocate_shared_memory(
        dtype, [CONSUMERS, ROWS, BLOCK_D], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    )
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_cache_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_cache_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    nonfinite_s = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=CONSUMERS)
        mbarrier.init(v_free.index(slot), count=CONSUMERS)
    mbarrier.init(landed, count=1)
    ring = (k_s, v_s, k_full, v_full, k_free, v_free)

    pointers = (out_ptr, lse_ptr, q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr)
    sizes = (q_len, causal_offset, num_kv_heads, group_size, flags)
    strides = (
        (stride_qb, stride_qh, stride_qm),
        (stride_kcb, stride_kch, stride_kcn), (stride_vcb, stride_vch, stride_vcn),
        (stride_knb, stride_knh, stride_knn), (stride_vnb, stride_vnh, stride_vnn),
    )  # fmt: skip
    shared = (q_s, ring, nonfinite_s)
    program = (b, h, first_row, attended, new_keys, num_queries, new_stop, append_stop)
    descriptors = (k_cache_desc, v_cache_desc, k_new_desc, v_new_desc)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (pointers, qk_scale, sizes, strides, shared, program,
                           0, BLOCK_N, BLOCK_D, STAGES, IN_REGISTERS)),
                (produce, (pointers, descriptors, strides, shared, program, BLOCK_N, BLOCK_D, STAGES)),
            ],
            [1], [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (pointers, qk_scale, sizes, strides, shared, program,
                           0, BLOCK_N, BLOCK_D, STAGES, IN_REGISTERS)),
                (consume, (pointers, qk_scale, sizes, strides, shared, program,
                           1, BLOCK_N, BLOCK_D, STAGES, IN_REGISTERS)),
                (produce, (pointers, descriptors, strides, shared, program, BLOCK_N, BLOCK_D, STAGES)),
            ],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    for consumer in range(CONSUMERS):
        if gl.max(nonfinite_s.index(consumer).load(FLAG), axis=0) > 0:
            attend_again(
                pointers, descriptors, qk_scale, sizes, strides, shared, program, consumer, landed, BLOCK_N, BLOCK_D
            )
