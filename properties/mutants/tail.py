"""Partial tiles of keys, rows and columns."""

from __future__ import annotations

from properties.mutants.mutant import PRIMITIVES, SPLIT_KV, WRAPPER, Edit, Mutant

VALUES = ("within_the_error_budget",)
POISON = ("invisible",)
CANARY = ("nothing_else_is_written",)

_VISIBLE = "visible = (start_n + offs_n)[None, :] < row_limit[:, None]"
_BOTH_MASKS = "mask=(offs_n < stop)[:, None] & (offs_d < head_dim)[None, :], other=0.0,"
_ROW_MASK = "mask=(offs_n < stop)[:, None], other=0.0, eviction_policy"
_OUTPUT_MASK = """\
mask=in_tile[:, None] & in_head[None, :],
    )
    if flags & RETURN_LSE"""

MUTANTS = (
    Mutant(
        "M01",
        "TAIL",
        "the padding keys of the last tile take part in the softmax, with score 0",
        "kv_len % BLOCK_N != 0",
        (Edit(PRIMITIVES, _VISIBLE, f"{_VISIBLE}\n        visible = visible | ((start_n + offs_n)[None, :] >= stop)"),),
        VALUES,
    ),
    Mutant(
        "M02",
        "TAIL",
        "the mask of the key tail says <= and lets one slot too many in",
        "kv_len % BLOCK_N != 0",
        (
            Edit(PRIMITIVES, _VISIBLE, _VISIBLE.replace("< row_limit", "< (row_limit + (row_limit == stop))")),
            Edit(PRIMITIVES, _BOTH_MASKS, _BOTH_MASKS.replace("< stop", "<= stop")),
            Edit(PRIMITIVES, _ROW_MASK, _ROW_MASK.replace("< stop", "<= stop")),
        ),
        (*VALUES, *POISON),
    ),
    Mutant(
        "M04",
        "TAIL",
        "the last tile of keys is skipped when it is full",
        "kv_len % BLOCK_N == 0",
        (
            Edit(
                SPLIT_KV,
                "for start_n in range(start, stop, BLOCK_N):",
                "for start_n in range(start, stop - tl.where(stop % BLOCK_N == 0, BLOCK_N, 0), BLOCK_N):",
            ),
            Edit(
                PRIMITIVES,
                "for start_n in range(start, full_stop, BLOCK_N):",
                "for start_n in range(start, full_stop - tl.where(full_stop == stop, BLOCK_N, 0), BLOCK_N):",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "M05",
        "POISON",
        "values past the end of the keys are loaded; their weight is 0, but 0 * NaN is NaN",
        "kv_len % BLOCK_N != 0, stale slots not finite",
        (
            Edit(
                PRIMITIVES,
                "v = load_tile(v_tile_ptr, offs_n, offs_d, stride_vn, stop - start_n, head_dim, MASK_N,",
                "v = load_tile(v_tile_ptr, offs_n, offs_d, stride_vn, stop - start_n, head_dim, False,",
            ),
        ),
        (*POISON, *VALUES),
    ),
    Mutant(
        "M07",
        "TAIL",
        "columns at and past head_dim are loaded",
        "head_dim padded to the next power of two",
        (
            Edit(PRIMITIVES, _BOTH_MASKS, "mask=(offs_n < stop)[:, None], other=0.0,"),
            Edit(PRIMITIVES, "    elif MASK_D:\n", "    elif False:\n"),
        ),
        (*POISON, *VALUES),
    ),
    Mutant(
        "M09",
        "TAIL",
        "rows past the last query are stored",
        "q_len * group_size % BLOCK_M != 0",
        (Edit(PRIMITIVES, _OUTPUT_MASK, _OUTPUT_MASK.replace("in_tile[:, None] & in_head", "in_head")),),
        (*CANARY, *VALUES),
    ),
    Mutant(
        "F01",
        "TAIL",
        "a copy padded to a multiple of 8 columns keeps what was in the padding",
        "head_dim % 8 != 0",
        (Edit(WRAPPER, "    copy[..., head_dim:].zero_()\n", ""),),
        (*POISON, *VALUES),
    ),
    Mutant(
        "F02",
        "TAIL",
        "the partial tile of an unsplit segment runs without masks",
        "prefill, length % BLOCK_N != 0",
        (
            Edit(
                PRIMITIVES,
                "full_stop = start + tl.maximum(tl.minimum(stop, common_limit) - start, 0) // BLOCK_N * BLOCK_N",
                "full_stop = start + tl.cdiv(tl.maximum(tl.minimum(stop, common_limit) - start, 0), BLOCK_N) * BLOCK_N",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F03",
        "TAIL",
        "the padding columns of the output are stored over the next row",
        "head_dim not a power of two",
        (Edit(PRIMITIVES, _OUTPUT_MASK, _OUTPUT_MASK.replace(" & in_head[None, :]", "")),),
        (*CANARY, *VALUES),
    ),
)
