"""A decode step on Hopper: what ``split_kv_attention`` does for one query, with tiles copied by hardware.

The tiles of a program's keys and values pass through a ring in shared memory, which the tensor memory accelerator
fills: one thread asks for a whole tile, and none computes its addresses. Keys are the rows of the products, so that the
heads of a group are columns: a matrix instruction has 16 rows, but 8 columns. The new token is copied to its place in
the last tile of its row, as if the cache held it already.

Written in Gluon, Triton's language a level below: Triton copies to shared memory either by hardware or with a mask, and
here the last tile of a row needs one and all others the other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier
from triton.language import debug_barrier

from flashcore.fast import tuning
from flashcore.fast.kernels import primitives
from flashcore.fast.kernels.prefill_sm90 import copy_box, copy_elements, known_multiple_of_8, report_fault
from flashcore.fast.kernels.primitives import (
    APPEND,
    HAS_NEW_LENS,
    HAS_SEQ_LENS,
    LENGTHS,
    LONG_NEW_LENS,
    LONG_SEQ_LENS,
    RETURN_LSE,
    SPLIT_GROUP,
)
from flashcore.fast.kernels.split_kv import RUN_TIME_ARGUMENTS

row_splits = gluon.jit(primitives.row_splits.fn)

NUM_WARPS = gl.constexpr(4)

LONG_SPLIT, LONGEST_SPLIT = gl.constexpr(tuning.SM90_LONG_SPLIT), gl.constexpr(tuning.SM90_LONGEST_SPLIT)

PRODUCTS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
"""How the products [keys, heads] and [head_dim, heads] lie in registers: each warp has some of the keys or columns."""

OF_HEADS = gl.constexpr(gl.SliceLayout(0, PRODUCTS))

COLUMNS = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
"""Of one token, [head_dim] in global memory: 16 bytes a thread."""


@gluon.constexpr_function
def of_every_warp(heads):
    """[warps, heads]: as OF_HEADS, and each thread has those of all warps."""
    of_heads = [[0, 1], [0, 8]][: 1 + (heads > 8)]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout([[1, 0], [2, 0], *of_heads], lanes, [[0, 0], [0, 0]], [], [4, heads])


@gluon.constexpr_function
def io_layout(block_d):
    """16-bit rows [heads, head_dim] in global memory: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // block_d, block_d // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def state_layout(block_d):
    """States [head_dim, heads] in global memory: 4 elements of a head a thread."""
    return gl.BlockedLayout([4, 1], [block_d // 4, 128 // block_d], [1, 4], [0, 1])


@gluon.jit
def no_keys(BLOCK_D: gl.constexpr, HEADS: gl.constexpr, LAYOUT: gl.constexpr):
    """The running state before any key: acc [BLOCK_D, HEADS], m_i and l_i [HEADS]."""
    m_i = gl.full([HEADS], -float("inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    l_i = gl.zeros([HEADS], gl.float32, gl.SliceLayout(0, LAYOUT))
    return gl.zeros([BLOCK_D, HEADS], gl.float32, LAYOUT), m_i, l_i


@gluon.jit
def merge_partial(acc, m_i, l_i, acc_s, m_s, l_s):
    """Fold the state of one split into the running one, rounding by rounding as ``primitives.merge_partial`` does."""
    m_new = gl.maximum(m_i, m_s)
    m_base = gl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = gl.exp2(m_i - m_base)
    beta = gl.exp2(m_s - m_base)
    return acc * alpha[None, :] + acc_s * beta[None, :] + 0.0, m_new, l_i * alpha + l_s * beta


@gluon.jit
def ask_for_length(ptr, at, is_long):
    """The words of a length, see ``primitives.load_length``.

    Volatile, or the assembler would move the loads to where they are used.
    """
    return gl.load(ptr + at, volatile=True), gl.load(ptr + at + is_long, volatile=True)


@gluon.jit
def checked_length(words, is_given, is_long, bound):
    """A length between 0 and ``bound``, which it is if none is given, and whether it was in range."""
    low, high = words
    given = gl.where((is_long != 0) & (high != low >> 31), -1, low)
    given = gl.where(is_given != 0, given, bound)
    length = gl.minimum(gl.maximum(given, 0), bound)
    return length, length == given


@gluon.jit
def splits_of(cached, split_rule, BLOCK_N: gl.constexpr):
    """As ``primitives.row_splits``, but a row that is not split costs no divisions."""
    unsplit_size, kv_split_size, few_splits, max_splits = split_rule
    num_splits, split_size = 1, gl.maximum(gl.cdiv(cached, BLOCK_N), 1) * BLOCK_N
    if cached > unsplit_size:
        num_splits, split_size = row_splits(
            cached, unsplit_size, kv_split_size, few_splits, max_splits, LONG_SPLIT, LONGEST_SPLIT, BLOCK_N
        )
    return num_splits, split_size


@gluon.jit
def copy_whole(ring, b, h, start_n, place):
    """Have the keys and values of slots ``start_n`` and following copied to a place of the ring."""
    k_s, v_s, full, k_desc, v_desc = ring
    slot = place % k_s.shape[0]
    mbarrier.expect(full.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    copy_box(k_desc, [b, h, start_n, 0], full.index(slot), k_s.index(slot))
    copy_box(v_desc, [b, h, start_n, 0], full.index(slot), v_s.index(slot))


@gluon.jit
def copy_rows(
    tile_s, cache_ptr, stride, new_ptr, start_n, num_keys, new_key, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr
):  # fmt: skip
    """Copy the first ``num_keys`` slots from ``start_n`` on, and the new token as row ``new_key``, unless that is -1.

    The other rows become 0, and what they hide is not read: it has weight 0, but 0 * NaN is NaN.
    """
    IO: gl.constexpr = io_layout(BLOCK_D)
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, IO))
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, IO))
    row_ptrs = cache_ptr + (start_n + rows).to(gl.int64) * stride
    is_new = rows == new_key
    ptrs = gl.where(is_new[:, None], (new_ptr + columns)[None, :], row_ptrs[:, None] + columns[None, :])
    copy_elements(tile_s, ptrs, ((rows < num_keys) | is_new)[:, None])


@gluon.jit
def copy_tile(ring, program, pointers, tile, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """Have tile number ``tile`` of a program copied to its place of the ring; the last may be less than a tile.

    program   batch row, kv head, first slot, slots, place in its tile of the new token, and how many places of the ring
              come before the tiles
    pointers  to keys and values of the kv head, strides of their slots, pointers to the new token's
    """
    b, h, start, num_keys, new_key, skew = program
    k_s, v_s, full, _, _ = ring
    place = tile + skew
    start_n = start + tile * BLOCK_N
    left = num_keys - tile * BLOCK_N
    if left >= BLOCK_N:
        copy_whole(ring, b, h, start_n, place)
    else:
        k_ptr, v_ptr, stride_k, stride_v, k_new_ptr, v_new_ptr = pointers
        slot = place % k_s.shape[0]
        k_tile = k_s.index(slot).reshape([BLOCK_N, BLOCK_D])
        v_tile = v_s.index(slot).reshape([BLOCK_N, BLOCK_D])
        copy_rows(k_tile, k_ptr, stride_k, k_new_ptr, start_n, left, new_key, BLOCK_N, BLOCK_D)
        copy_rows(v_tile, v_ptr, stride_v, v_new_ptr, start_n, left, new_key, BLOCK_N, BLOCK_D)
        async_copy.mbarrier_arrive(full.index(slot))
        # Every thread's copies are counted before the one arrival that was expected from the first.
        debug_barrier()
        mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def wait_for(full, place):
    """Wait until the tile at a place of the ring has come."""
    stages: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(place % stages), place // stages & 1)


@gluon.jit
def of_warps(values):
    """[BLOCK_N, HEADS] in PRODUCTS as [BLOCK_N / 64, warps, 16, HEADS]: the keys of a warp are 16 of every 64."""
    return values.reshape([values.shape[0] // 64, NUM_WARPS, 16, values.shape[1]])


@gluon.jit
def maximum_of_keys(logits):
    """The maximum over the keys, [HEADS] in OF_HEADS, of [BLOCK_N, HEADS] in PRODUCTS.

    A reduction through the compiler would meet at one barrier more, and so would a sum.
    """
    every_warp = gl.convert_layout(gl.max(gl.max(of_warps(logits), axis=0), axis=1), of_every_warp(logits.shape[1]))
    return gl.convert_layout(gl.max(every_warp, axis=0), OF_HEADS)


@gluon.jit
def sum_of_keys(weights):
    """The sum over the keys, like ``maximum_of_keys``."""
    every_warp = gl.convert_layout(gl.sum(gl.sum(of_warps(weights), axis=0), axis=1), of_every_warp(weights.shape[1]))
    return gl.convert_layout(gl.sum(every_warp, axis=0), OF_HEADS)


@gluon.jit
def fold_tile(
    acc, m_i, l_i, q, ring, program, pointers, tile, num_tiles, visible_keys, qk_scale,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """Fold tile number ``tile`` of a program into the state of its split, and ask for a later one.

    acc           [BLOCK_D, HEADS]  float32
    m_i           [HEADS]           float32
    l_i           [BLOCK_N, HEADS]  float32: the keys of a tile add up each for itself, and together once a split
    q             [BLOCK_D, HEADS]  input dtype, in registers
    visible_keys  of the program, the new token included

    program and pointers are those of ``copy_tile``.
    """
    k_s, v_s, full, _, _ = ring
    _, _, _, _, _, skew = program
    STAGES: gl.constexpr = k_s.shape[0]
    ROWS: gl.constexpr = gl.DotOperandLayout(0, PRODUCTS, 2)
    place = tile + skew
    slot = place % STAGES
    wait_for(full, place)
    k = k_s.index(slot).reshape([BLOCK_N, BLOCK_D]).load(ROWS)
    logits = mma_v2(k, q, gl.zeros([BLOCK_N, HEADS], gl.float32, PRODUCTS)) * qk_scale
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(1, PRODUCTS))
    logits = gl.where((keys < visible_keys - tile * BLOCK_N)[:, None], logits, -float("inf"))
    m_new = gl.maximum(m_i, maximum_of_keys(logits))
    # That maximum is over all warps: none of them still reads the tile before, whose place is the next to be filled.
    ahead = tile + STAGES - 1
    if ahead < num_tiles:
        copy_tile(ring, program, pointers, ahead, BLOCK_N, BLOCK_D)
    # While a head has seen no key, m_new is -inf, and (-inf) - (-inf) is NaN.
    m_base = gl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = gl.exp2(m_i - m_base)
    p = gl.exp2(logits - m_base[None, :])
    l_i = l_i * alpha[None, :] + p
    p = gl.convert_layout(p.to(k_s.dtype), gl.DotOperandLayout(1, PRODUCTS, 2))
    v_t = v_s.index(slot).reshape([BLOCK_N, BLOCK_D]).permute((1, 0)).load(ROWS)
    return mma_v2(v_t, p, acc * alpha[None, :]), m_new, l_i


@gluon.jit
def store_rows(out_ptr, lse_ptr, acc, m_i, l_i, first_row, group_size, sees_keys, flags, BLOCK_D: gl.constexpr):
    """Divide by the sum of weights, as ``primitives.finish`` does, and store the output and the LSE if asked for.

    acc [BLOCK_D, HEADS], m_i and l_i [HEADS], in ``state_layout``.
    """
    STATE: gl.constexpr = state_layout(BLOCK_D)
    ln_2: gl.constexpr = 0.6931471805599453
    # Rows without keys have acc = l_i = 0, and 0 / 0 is NaN.
    out = gl.where(sees_keys, acc / gl.where(sees_keys, l_i, 1.0)[None, :], 0.0)
    heads = gl.arange(0, acc.shape[1], gl.SliceLayout(0, STATE))
    offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(1, STATE))
    rows = first_row + heads
    at = rows[None, :] * BLOCK_D + offs_d[:, None]
    gl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(heads < group_size)[None, :])
    if flags & RETURN_LSE:
        lse = gl.where(sees_keys, (m_i + gl.log2(l_i)) * ln_2, -float("inf"))
        gl.store(lse_ptr + rows, lse, mask=heads < group_size)


@gluon.jit
def stored_partial(partial, num_partials, pointers, scratch, group_size, BLOCK_D: gl.constexpr, HEADS: gl.constexpr):
    """The stored state number ``partial``, in ``state_layout``, or that of no keys."""
    out_ptr, m_ptr, l_ptr = pointers
    STATE: gl.constexpr = state_layout(BLOCK_D)
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, STATE))
    offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(1, STATE))
    exists = (heads < group_size) & (partial < num_partials)
    rows = scratch + partial * group_size + heads
    m_i = gl.load(m_ptr + rows, mask=exists, other=-float("inf"))
    l_i = gl.load(l_ptr + rows, mask=exists, other=0.0)
    acc = gl.load(out_ptr + rows[None, :] * BLOCK_D + offs_d[:, None], mask=exists[None, :], other=0.0)
    return acc, m_i, l_i


@gluon.jit
def stored_group(first, num_partials, pointers, scratch, group_size, BLOCK_D: gl.constexpr, HEADS: gl.constexpr):
    """The stored states number ``first`` to ``first + 3``."""
    n = num_partials
    s_0 = stored_partial(first, n, pointers, scratch, group_size, BLOCK_D, HEADS)
    s_1 = stored_partial(first + 1, n, pointers, scratch, group_size, BLOCK_D, HEADS)
    s_2 = stored_partial(first + 2, n, pointers, scratch, group_size, BLOCK_D, HEADS)
    s_3 = stored_partial(first + 3, n, pointers, scratch, group_size, BLOCK_D, HEADS)
    return s_0, s_1, s_2, s_3


@gluon.jit
def merge_group(acc, m_i, l_i, states, are_groups):
    """Fold four states into the running one: each for itself if they are groups, else as one group."""
    # Nothing is merged first: a state with nothing is itself, so that both ways are the same code.
    g_acc = gl.where(are_groups, acc, 0.0)
    g_m = gl.where(are_groups, m_i, -float("inf"))
    g_l = gl.where(are_groups, l_i, 0.0)
    for i in gl.static_range(4):
        g_acc, g_m, g_l = merge_partial(g_acc, g_m, g_l, states[i][0], states[i][1], states[i][2])
    r_acc, r_m, r_l = merge_partial(acc, m_i, l_i, g_acc, g_m, g_l)
    return gl.where(are_groups, g_acc, r_acc), gl.where(are_groups, g_m, r_m), gl.where(are_groups, g_l, r_l)


@gluon.jit
def merge_stored(
    num_partials, are_groups, pointers, scratch, group_size, BLOCK_D: gl.constexpr, HEADS: gl.constexpr
):  # fmt: skip
    """Merge the stored states of a row's splits or groups of splits, in order, as ``primitives.merge_stored`` does."""
    n = num_partials
    acc, m_i, l_i = no_keys(BLOCK_D, HEADS, state_layout(BLOCK_D))
    for first in range(0, n, 2 * SPLIT_GROUP):
        # Two groups are loaded before the first state is merged: then their latencies overlap.
        group = stored_group(first, n, pointers, scratch, group_size, BLOCK_D, HEADS)
        second = first + SPLIT_GROUP
        next_group = stored_group(second, n, pointers, scratch, group_size, BLOCK_D, HEADS)
        acc, m_i, l_i = merge_group(acc, m_i, l_i, group, are_groups)
        if second < n:
            acc, m_i, l_i = merge_group(acc, m_i, l_i, next_group, are_groups)
    return acc, m_i, l_i


@gluon.jit(do_not_specialize=[*RUN_TIME_ARGUMENTS, "row_programs", "shortest"], do_not_specialize_on_alignment=LENGTHS)
def split_kv_attention_sm90(
    out_ptr, lse_ptr, seq_lens_out_ptr, partial_out_ptr, partial_m_ptr, partial_l_ptr, arrivals_ptr, fault_ptr,
    q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, seq_lens_ptr, new_lens_ptr,
    qk_scale,
    max_cached, q_len, num_new_keys, causal_offset, num_kv_heads, group_size, head_dim, slot_limit, flags,  # noqa: ARG001
    grid_splits, splits_per_program, unsplit_size, kv_split_size, few_splits, max_splits, likely_split_size,
    row_programs, shortest,
    stride_seq, stride_new,
    stride_qb, stride_qh, stride_qm,  # noqa: ARG001
    stride_kcb, stride_kch, stride_kcn, stride_vcb, stride_vch, stride_vcn,
    stride_knb, stride_knh, stride_knn, stride_vnb, stride_vnh, stride_vnn,  # noqa: ARG001
    k_cache_desc, v_cache_desc,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, HEADS: gl.constexpr, MERGE_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What ``split_kv_attention`` does where q_len is 1, head_dim BLOCK_D, and group_size at most HEADS.

    The two descriptors say what pointers and strides of the cache say, for copies by hardware. ``shortest`` slots are
    in every row, as far as the host knows: whole tiles below are asked for before the length of the row has come, and
    not used where it is another than was likely. ``likely_split_size`` is -1 where rows differ much.

    Scratch: as there. Grid: [row_programs, num_kv_heads, batch], or all in the first dimension, row_programs programs
    for each row; those past a row's own splits leave.
    """
    DTYPE: gl.constexpr = k_cache_desc.dtype
    IO: gl.constexpr = io_layout(BLOCK_D)
    STATE: gl.constexpr = state_layout(BLOCK_D)
    # Batch rows or heads that are too many for the grid's other dimensions are in its first, at the price of divisions
    # that everything waits for.
    first_split, h, b = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    if gl.num_programs(1) * gl.num_programs(2) == 1:
        kv_head = first_split // row_programs
        first_split = first_split % row_programs
        b = kv_head // num_kv_heads
        h = kv_head % num_kv_heads
    first_split *= splits_per_program
    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    kv_head = b64 * num_kv_heads + h  # of all rows
    # The lengths before anything else: behind the tiles of all programs they would come late.
    is_long_seq = (flags & LONG_SEQ_LENS) // LONG_SEQ_LENS
    is_long_new = (flags & LONG_NEW_LENS) // LONG_NEW_LENS
    seq_words = ask_for_length(seq_lens_ptr, b64 * stride_seq, is_long_seq)
    new_words = ask_for_length(new_lens_ptr, b64 * stride_new, is_long_new)
    split_rule = (unsplit_size, kv_split_size, few_splits, max_splits)
    if (first_split > 0) & (likely_split_size < 0):
        # Rows that differ: many programs have nothing to do, and leave before they ask for more.
        early_cached, _ = checked_length(seq_words, flags & HAS_SEQ_LENS, is_long_seq, max_cached)
        early_splits, _ = splits_of(early_cached, split_rule, BLOCK_N)
        if first_split >= early_splits:
            return

    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_cache_desc.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_cache_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    ring = (k_s, v_s, full, k_cache_desc, v_cache_desc)
    # Before the length has come, whole tiles are asked for that are known to be the first, or likely.
    likely_start = first_split * likely_split_size
    if first_split == 0:
        likely_start, likely_split_size = 0, kv_split_size
    likely_stop = gl.minimum(likely_start + splits_per_program * likely_split_size, shortest)
    likely_tiles = gl.minimum(gl.maximum(likely_stop - likely_start, 0) // BLOCK_N, STAGES - 1)
    for early in range(likely_tiles):
        copy_whole(ring, b, h, likely_start + early * BLOCK_N, early)

    # So are the query and the new token, by copies to shared memory: loads would be moved behind that wait.
    q_s = gl.allocate_shared_memory(
        DTYPE, [HEADS, BLOCK_D], gl.NVMMASharedLayout.get_default_for([HEADS, BLOCK_D], DTYPE)
    )
    new_s = gl.allocate_shared_memory(DTYPE, [2, BLOCK_D], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    heads = gl.arange(0, HEADS, gl.SliceLayout(1, IO))
    offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, IO))
    q_ptr += b64 * known_multiple_of_8(stride_qb) + h64 * group_size * known_multiple_of_8(stride_qh)
    q_ptrs = q_ptr + (heads.to(gl.int64) * known_multiple_of_8(stride_qh))[:, None] + offs_d[None, :]
    copy_elements(q_s, q_ptrs, (heads < group_size)[:, None])
    k_new_ptr += b64 * known_multiple_of_8(stride_knb) + h64 * known_multiple_of_8(stride_knh)
    v_new_ptr += b64 * known_multiple_of_8(stride_vnb) + h64 * known_multiple_of_8(stride_vnh)
    columns = gl.arange(0, BLOCK_D, COLUMNS)
    if ((flags & APPEND) != 0) & (num_new_keys > 0):
        copy_elements(new_s.index(0), k_new_ptr + columns)
        copy_elements(new_s.index(1), v_new_ptr + columns)
    async_copy.commit_group()

    cached, lengths_ok = checked_length(seq_words, flags & HAS_SEQ_LENS, is_long_seq, max_cached)
    num_queries, new_ok = checked_length(new_words, flags & HAS_NEW_LENS, is_long_new, q_len)
    lengths_ok = lengths_ok & new_ok & (max_cached >= 0)
    new_keys = gl.where((flags & HAS_NEW_LENS) != 0, num_queries, num_new_keys)
    num_splits, split_size = splits_of(cached, split_rule, BLOCK_N)
    last_split = gl.minimum(first_split + splits_per_program, num_splits)
    start = first_split * split_size
    num_keys = gl.maximum(gl.minimum(last_split * split_size, cached) - start, 0)
    skew = 0
    if (likely_start != start) | (likely_tiles > num_keys // BLOCK_N):
        # The tiles are others than were asked for, whose places must be filled before anyone can have them.
        skew = likely_tiles
        for place in range(likely_tiles):
            wait_for(full, place)
    if first_split >= num_splits:
        async_copy.wait_group(0)
        return

    # The last split also takes the new token, in its place in the row.
    takes_new = last_split == num_splits
    has_new = takes_new & (new_keys > 0)
    new_key = gl.where(has_new, num_keys % BLOCK_N, -1)
    visible_keys = num_keys + gl.where(has_new, 1, 0)
    num_tiles = gl.cdiv(visible_keys, BLOCK_N)
    stride_k, stride_v = known_multiple_of_8(stride_kcn), known_multiple_of_8(stride_vcn)
    k_cache_ptr += b64 * known_multiple_of_8(stride_kcb) + h64 * known_multiple_of_8(stride_kch)
    v_cache_ptr += b64 * known_multiple_of_8(stride_vcb) + h64 * known_multiple_of_8(stride_vch)
    program = (b, h, start, num_keys, new_key, skew)
    pointers = (k_cache_ptr, v_cache_ptr, stride_k, stride_v, k_new_ptr, v_new_ptr)
    for early in range(gl.where(skew > 0, 0, likely_tiles), gl.minimum(num_tiles, STAGES - 1)):
        copy_tile(ring, program, pointers, early, BLOCK_N, BLOCK_D)
    async_copy.commit_group()

    fits = lengths_ok & (cached + num_queries <= slot_limit)
    if takes_new & (h == 0):
        if flags & APPEND:
            gl.store(seq_lens_out_ptr + b, gl.where(fits, cached + num_queries, cached))
            report_fault(fault_ptr, b, lengths_ok, fits)
        elif flags & (HAS_SEQ_LENS | HAS_NEW_LENS):
            report_fault(fault_ptr, b, lengths_ok, lengths_ok)
    async_copy.wait_group(1)
    q_t = q_s.permute((1, 0)).load(gl.DotOperandLayout(1, PRODUCTS, 2))

    split_tiles = split_size // BLOCK_N
    num_splits_here = last_split - first_split
    has_whole_row = splits_per_program >= num_splits
    group_acc, group_m, group_l = no_keys(BLOCK_D, HEADS, PRODUCTS)
    row_acc, row_m, row_l = no_keys(BLOCK_D, HEADS, PRODUCTS)
    for group_start in range(0, num_splits_here, SPLIT_GROUP):
        group_acc, group_m, group_l = no_keys(BLOCK_D, HEADS, PRODUCTS)
        for split in range(group_start, gl.minimum(group_start + SPLIT_GROUP, num_splits_here)):
            acc, m_i, _ = no_keys(BLOCK_D, HEADS, PRODUCTS)
            l_i = gl.zeros([BLOCK_N, HEADS], gl.float32, PRODUCTS)
            split_stop = gl.where(split + 1 == num_splits_here, num_tiles, (split + 1) * split_tiles)
            for tile in range(split * split_tiles, split_stop):
                acc, m_i, l_i = fold_tile(
                    acc, m_i, l_i, q_t, ring, program, pointers, tile, num_tiles, visible_keys, qk_scale,
                    BLOCK_N, BLOCK_D, HEADS,
                )  # fmt: skip
            group_acc, group_m, group_l = merge_partial(group_acc, group_m, group_l, acc, m_i, sum_of_keys(l_i))
        if has_whole_row:
            row_acc, row_m, row_l = merge_partial(row_acc, row_m, row_l, group_acc, group_m, group_l)

    if has_new & ((flags & APPEND) != 0) & fits:
        slot64 = cached.to(gl.int64)
        gl.store(k_cache_ptr + slot64 * stride_k + columns, new_s.index(0).load(COLUMNS))
        gl.store(v_cache_ptr + slot64 * stride_v + columns, new_s.index(1).load(COLUMNS))
    sees_keys = (num_queries > 0) & ((cached > 0) | (new_keys > 0))
    first_row = kv_head * group_size
    state_acc = gl.convert_layout(gl.where(has_whole_row, row_acc, group_acc), STATE)
    state_m = gl.convert_layout(gl.where(has_whole_row, row_m, group_m), gl.SliceLayout(0, STATE))
    state_l = gl.convert_layout(gl.where(has_whole_row, row_l, group_l), gl.SliceLayout(0, STATE))
    if has_whole_row:
        store_rows(out_ptr, lse_ptr, state_acc, state_m, state_l, first_row, group_size, sees_keys, flags, BLOCK_D)
    else:
        num_partials = gl.cdiv(num_splits, splits_per_program)
        # Where this row's first partial result is kept; the others follow.
        scratch = first_row * grid_splits
        state_heads = gl.arange(0, HEADS, gl.SliceLayout(0, STATE))
        state_d = gl.arange(0, BLOCK_D, gl.SliceLayout(1, STATE))
        rows = scratch + first_split // splits_per_program * group_size + state_heads
        in_group = state_heads < group_size
        at = rows[None, :] * BLOCK_D + state_d[:, None]
        gl.store(partial_out_ptr + at, state_acc, mask=in_group[None, :])
        gl.store(partial_m_ptr + rows, state_m, mask=in_group)
        gl.store(partial_l_ptr + rows, state_l, mask=in_group)
        # Every thread's stores come before the arrival that publishes them.
        debug_barrier()
        arrival_ptr = arrivals_ptr + kv_head
        if gl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_partials - 1:
            gl.store(arrival_ptr, 0)
            stored = (partial_out_ptr, partial_m_ptr, partial_l_ptr)
            acc_m, m_m, l_m = merge_stored(
                num_partials, splits_per_program > 1, stored, scratch, group_size, BLOCK_D, MERGE_M
            )
            store_rows(out_ptr, lse_ptr, acc_m, m_m, l_m, first_row, group_size, sees_keys, flags, BLOCK_D)
