"""Changes that break no promise: a law that objects raises a false alarm."""

from __future__ import annotations

from properties.mutants.mutant import CACHE, PREFILL, PRIMITIVES, RELAUNCH, SPLIT_KV, TUNING, WRAPPER, Edit, Mutant


def _neutral(id_: str, change: str, *edits: Edit, laws: tuple[str, ...] = ()) -> Mutant:
    return Mutant(id_, "NEUTRAL", change, "nowhere", edits, laws, neutral=True)


_MASKED_TILES = "    for start_n in tl.range(full_stop, stop, BLOCK_N, num_stages=STAGES):\n"
_BACKWARDS = """\
    for done in range(full_stop, stop, BLOCK_N):
        start_n = full_stop + (tl.cdiv(stop - full_stop, BLOCK_N) - 1) * BLOCK_N - (done - full_stop)
"""
_TILE = """\
        acc, m_i, l_i = attend_tile(
            acc, m_i, l_i, q, k_cache_ptr, v_cache_ptr, start_n, stop, cached_limit, qk_scale, head_dim,
"""
_BACKWARDS_IN_SPLIT = """\
        done = (start_n - start) % split_size
        in_split = tl.minimum(split_size, stop - (start_n - done))
        tile_n = start_n - done + (tl.cdiv(in_split, BLOCK_N) - 1) * BLOCK_N - done
"""
_LOGITS = """\
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale  # [BLOCK_M, BLOCK_N]
"""
_MASKED = """\
        logits = tl.where(visible, logits, -float("inf"))
    if not"""
_FIRST_STATE = "states[0], states[1], states[2]"
_HEAD = "h = tl.program_id(0) // row_programs % num_kv_heads"
_ROW = "b = tl.program_id(0) // row_programs // num_kv_heads"
_NO_MAXIMUM = 'tl.full([BLOCK_M], -float("inf"), tl.float32)'


MUTANTS = (
    _neutral(
        "N2",
        "the default tiles of keys are half as long",
        Edit(
            TUNING,
            "_forced.block_n or _default_block_n(path, q_len == 1 and block_m == 16, is_float32, block_d)",
            "_forced.block_n or max(\n"
            "        16, _default_block_n(path, q_len == 1 and block_m == 16, is_float32, block_d) // 2\n    )",
        ),
    ),
    _neutral(
        "N3",
        "the tiles of a split, and those with a mask, are visited in reverse",
        Edit(SPLIT_KV, _TILE, _BACKWARDS_IN_SPLIT + _TILE.replace("start_n", "tile_n")),
        Edit(PRIMITIVES, _MASKED_TILES, _BACKWARDS),
        laws=("many_splits",),
    ),
    _neutral(
        "N4",
        "the running maximum starts at -1e30",
        Edit(PRIMITIVES, _NO_MAXIMUM, _NO_MAXIMUM.replace('-float("inf")', "-1e30")),
        Edit(PREFILL, _NO_MAXIMUM, _NO_MAXIMUM.replace('-float("inf")', "-1e30")),
    ),
    _neutral(
        "N5",
        "splits become longer from four of them on",
        Edit(TUNING, "FEW_SPLITS = 8\n", "FEW_SPLITS = 4\n"),
    ),
    _neutral(
        "N6",
        "hidden keys are masked before the scale",
        Edit(
            PRIMITIVES,
            _LOGITS,
            '    scores = tl.dot(q, tl.trans(k), input_precision="ieee")\n    logits = scores * qk_scale\n',
        ),
        Edit(
            PRIMITIVES,
            _MASKED,
            "        # A factor of 0 or below would turn -inf into NaN or +inf.\n"
            '        scores = tl.where(visible, scores, tl.where(qk_scale > 0, -float("inf"), 0.0))\n'
            '        logits = tl.where(visible | (qk_scale > 0), scores * qk_scale, -float("inf"))\n'
            + _MASKED.split("\n", 1)[1],
        ),
    ),
    _neutral(
        "N7",
        "every tile of rows stores the new tokens, to the same slots",
        Edit(SPLIT_KV, "stores = takes_new & (tile == 0)", "stores = takes_new"),
    ),
    _neutral(
        "N8",
        "programs count batch rows before kv heads",
        Edit(
            SPLIT_KV,
            _HEAD,
            "h = tl.program_id(0) // row_programs // (tl.num_programs(0) // row_programs // num_kv_heads)",
        ),
        Edit(
            SPLIT_KV,
            _ROW,
            "b = tl.program_id(0) // row_programs % (tl.num_programs(0) // row_programs // num_kv_heads)",
        ),
        laws=("many_splits",),
    ),
    _neutral(
        "N10",
        "every program takes one split",
        Edit(TUNING, "if rows >= enough and (is_even or", "if False and (is_even or"),
        Edit(TUNING, "return min(SPLIT_GROUP, most) if self._waits_us(", "return 1 if self._waits_us("),
        laws=("many_splits",),
    ),
    _neutral(
        "N11",
        "every program takes its whole row, the grid has one split more, repeated launches keep it a slot longer",
        Edit(TUNING, "if rows >= enough and (is_even or", "if True or (is_even or"),
        Edit(
            WRAPPER,
            "    grid_splits = plan.grid_splits(problem.max_cached)\n",
            "    grid_splits = plan.grid_splits(problem.max_cached) + 1\n",
        ),
        Edit(RELAUNCH, "range(last - size + 1, last + 1)", "range(last - size, last + 1)"),
        laws=("many_splits",),
    ),
    _neutral(
        "N12",
        "how even rows are, their shortest length and the size of the GPU are wrong where work is shared out",
        Edit(TUNING, "if rows >= enough and (is_even or", "if rows >= enough and (not is_even or"),
        Edit(CACHE, "and 4 * self.min_len >= 3 * self.max_len", "and 4 * self.min_len < 3 * self.max_len"),
        Edit(RELAUNCH, "past.min_len + self.q_len)", "past.min_len - self.q_len)"),
        Edit(WRAPPER, "min_len=lengths.shortest_after()", "min_len=lengths.shortest_after() // 2"),
        Edit(
            TUNING,
            "return Gpu(9, 0.0)",
            "return Gpu(4, 0.0)",
        ),
        Edit(
            RELAUNCH,
            "gpu, rows = self.plan.grid_splits(bound), tuning.gpu(self.device),",
            "gpu, rows = self.plan.grid_splits(bound), tuning.Gpu(36, 0.0),",
        ),
        laws=("many_splits",),
    ),
    _neutral(
        "N15",
        "the first split of a group is not merged with nothing, and short chunks are shared out in groups, too",
        Edit(
            PRIMITIVES,
            f"    group_acc, group_m, group_l = merge_partial(group_acc, group_m, group_l, {_FIRST_STATE})\n",
            "    if not ARE_GROUPS:\n"
            "        group_acc, group_m, group_l = states[0] + 0.0, states[1], states[2]\n"
            "    else:\n"
            f"        group_acc, group_m, group_l = merge_partial(acc, m_i, l_i, {_FIRST_STATE})\n",
        ),
        Edit(SPLIT_KV, "    if not SEVERAL:\n        splits_per_program = 1\n", ""),
        Edit(TUNING, "if not self.one_query or (crowd and not is_even):", "if crowd and not is_even:"),
        laws=("many_splits",),
    ),
    _neutral(
        "N17",
        "as many rows are merged as are attended to, and the host guesses at splits of one slot",
        Edit(
            TUNING,
            "merge_m=min(block_m, max(LEAST_MERGED_ROWS, next_power_of_2(rows))) if one_query else block_m",
            "merge_m=block_m",
        ),
        Edit(TUNING, "return self.split_size(longest) or 0", "return 1"),
        laws=("many_splits",),
    ),
    _neutral(
        "N16",
        "data that is not aligned to 16 bytes is not copied: Triton compiles another kernel for such an address",
        Edit(WRAPPER, "tensor.data_ptr() % 16 == 0 and ", ""),
        laws=("unaligned_inputs",),
    ),
)
