"""Strides, alignment and the width of offsets."""

from __future__ import annotations

from properties.mutants.mutant import PREFILL, PRIMITIVES, SPLIT_KV, WRAPPER, Edit, Mutant

VALUES = ("within_the_error_budget",)
STRIDES = ("strided_inputs", "within_the_error_budget")
LENGTHS = ("how_lengths_are_stored",)

_READABLE = (
    "if head_dim % 8 == 0 and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0"
    " and all(s % 8 == 0 for s in strides):"
)

MUTANTS = (
    Mutant(
        "F102",
        "STRIDE",
        "value tiles start where key tiles do",
        "key and value of different strides, several tiles",
        (
            Edit(
                PRIMITIVES,
                "v_tile_ptr = v_ptr + tl.cast(start_n, tl.int64) * stride_vn",
                "v_tile_ptr = v_ptr + tl.cast(start_n, tl.int64) * stride_kn",
            ),
        ),
        STRIDES,
    ),
    Mutant(
        "F100",
        "STRIDE",
        "elements of a token are taken to lie side by side",
        "a stride of head_dim that is not 1",
        (Edit(WRAPPER, _READABLE, _READABLE.replace("tensor.stride(3) == 1 and ", "")),),
        STRIDES,
    ),
    Mutant(
        "F101",
        "STRIDE",
        "strides are taken to be multiples of 8",
        "an odd stride of head or token",
        (Edit(WRAPPER, _READABLE, _READABLE.replace(" and all(s % 8 == 0 for s in strides)", "")),),
        STRIDES,
    ),
    Mutant(
        "F103",
        "STRIDE",
        "values within a tile are as far apart as keys",
        "key and value of different strides",
        (
            Edit(
                PRIMITIVES,
                "v = load_tile(v_tile_ptr, offs_n, offs_d, stride_vn, stop - start_n, head_dim, True",
                "v = load_tile(v_tile_ptr, offs_n, offs_d, stride_kn, stop - start_n, head_dim, True",
            ),
            Edit(
                PRIMITIVES,
                "v = load_tile(v_tile_ptr, offs_n, offs_d, stride_vn, stop - start_n, head_dim, MASK_N",
                "v = load_tile(v_tile_ptr, offs_n, offs_d, stride_kn, stop - start_n, head_dim, MASK_N",
            ),
        ),
        STRIDES,
    ),
    Mutant(
        "F104",
        "STRIDE",
        "queries are taken to be contiguous",
        "split path, a query with other strides of token",
        (Edit(SPLIT_KV, "query.to(tl.int64) * stride_qm)", "query.to(tl.int64) * head_dim)"),),
        STRIDES,
    ),
    Mutant(
        "F105",
        "STRIDE",
        "new values of a batch row are as far apart as new keys",
        "prefill, key and value of different strides, batch >= 2",
        (Edit(PREFILL, "v_new_ptr += b64 * stride_vnb", "v_new_ptr += b64 * stride_knb"),),
        STRIDES,
    ),
    Mutant(
        "F106",
        "STRIDE",
        "seq_lens are taken to be contiguous",
        "strided seq_lens, batch >= 2",
        (
            Edit(
                PRIMITIVES,
                "load_length(seq_lens_ptr, b.to(tl.int64) * stride_seq,",
                "load_length(seq_lens_ptr, b,",
            ),
        ),
        LENGTHS,
    ),
    Mutant(
        "F107",
        "STRIDE",
        "new_lens are taken to be contiguous",
        "strided new_lens, batch >= 2",
        (
            Edit(
                PRIMITIVES,
                "load_length(new_lens_ptr, b.to(tl.int64) * stride_new,",
                "load_length(new_lens_ptr, b,",
            ),
        ),
        LENGTHS,
    ),
    Mutant(
        "F108",
        "INT",
        "the offset of a key tile is a 32-bit number",
        "slot x stride beyond 2**31 elements",
        (
            Edit(
                PRIMITIVES,
                "k_tile_ptr = k_ptr + tl.cast(start_n, tl.int64) * stride_kn",
                "k_tile_ptr = k_ptr + tl.cast(start_n, tl.int32) * stride_kn",
            ),
            Edit(
                PRIMITIVES,
                "v_tile_ptr = v_ptr + tl.cast(start_n, tl.int64) * stride_vn",
                "v_tile_ptr = v_ptr + tl.cast(start_n, tl.int32) * stride_vn",
            ),
        ),
        ("two_to_the_31",),
    ),
)
