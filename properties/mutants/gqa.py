"""Which query heads share which kv head."""

from __future__ import annotations

from properties.mutants.mutant import PREFILL, PRIMITIVES, SPLIT_KV, WRAPPER, Edit, Mutant

VALUES = ("within_the_error_budget",)

_HEAD = "    q_head = h64 * group_size + head\n"
_SPLIT_OUTPUT = "out_row = (kv_head * group_size + head)"
_MERGED_OUTPUT = "out_row_m = (kv_head * group_size + head_m)"
_OTHER_HEAD = "(b64 * num_kv_heads * group_size + head * num_kv_heads + h64)"
_FEW_ROWS = "(b64 * num_kv_heads + h64 * group_size + head)"
_ROWS = "    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)\n"
_PADDED = """\
    group_size = tl.where(group_size <= 2, group_size, tl.where(group_size <= 4, 4, tl.where(
        group_size <= 8, 8, tl.where(group_size <= 16, 16, 32))))
"""

MUTANTS = (
    Mutant(
        "M40",
        "GQA",
        "query head h uses kv head h % num_kv_heads",
        "1 < num_kv_heads < num_q_heads",
        (
            Edit(PREFILL, _HEAD, "    q_head = head * num_kv_heads + h64\n"),
            Edit(SPLIT_KV, "h64 * group_size * stride_qh", "h64 * stride_qh"),
            Edit(SPLIT_KV, "(head.to(tl.int64) * stride_qh", "(head.to(tl.int64) * num_kv_heads * stride_qh"),
            Edit(SPLIT_KV, _SPLIT_OUTPUT, f"out_row = {_OTHER_HEAD}"),
            Edit(SPLIT_KV, _MERGED_OUTPUT, "out_row_m = " + _OTHER_HEAD.replace("head *", "head_m *")),
        ),
        VALUES,
    ),
    Mutant(
        "M42",
        "GQA",
        "the group is padded to a power of two, and the padding heads are stored",
        "group_size 3, 5, 6, 7",
        (
            Edit(PRIMITIVES, _ROWS, _PADDED + _ROWS),
            Edit(
                WRAPPER,
                "row_tiles = tuning.ceil_div(q_len * group_size, plan.block_m)",
                "row_tiles = tuning.ceil_div(q_len * tuning.next_power_of_2(group_size), plan.block_m)",
            ),
        ),
        ("within_the_error_budget", "nothing_else_is_written"),
    ),
    Mutant(
        "F45",
        "GQA",
        "a token whose rows begin in the middle of a tile's last group is not appended",
        "prefill, BLOCK_M % group_size != 0",
        (
            Edit(
                PREFILL,
                "last_token = tl.minimum((tile * BLOCK_M + BLOCK_M + group_size - 1)",
                "last_token = tl.minimum((tile * BLOCK_M + BLOCK_M)",
            ),
        ),
        ("append_stores",),
    ),
    Mutant(
        "F46",
        "GQA",
        "the output rows of a batch are num_kv_heads apart, not num_q_heads",
        "split path, group_size > 1, batch >= 2",
        (
            Edit(SPLIT_KV, _SPLIT_OUTPUT, f"out_row = {_FEW_ROWS}"),
            Edit(SPLIT_KV, _MERGED_OUTPUT, "out_row_m = " + _FEW_ROWS.replace("head)", "head_m)")),
        ),
        VALUES,
    ),
    Mutant(
        "F47",
        "GQA",
        "a tile of a short row's padding is skipped one tile too early",
        "prefill, new_lens * group_size ends inside a tile",
        (
            Edit(
                PREFILL,
                "    if tile * BLOCK_M // group_size < num_queries:",
                "    if (tile + 1) * BLOCK_M // group_size <= num_queries:",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F48",
        "GQA",
        "kv heads of a batch row are counted with the query heads",
        "split path, group_size > 1, splits > 1",
        (
            Edit(
                SPLIT_KV,
                "scratch = kv_head * grid_splits",
                "scratch = (b64 * num_kv_heads + h * group_size) * grid_splits",
            ),
        ),
        ("decode_over_several_splits", "a_row_alone", *VALUES),
    ),
)
