"""Keys shared among several programs, and the merge of what they found."""

from __future__ import annotations

from properties.mutants.mutant import PRIMITIVES, SPLIT_KV, TUNING, WRAPPER, Edit, Mutant

VALUES = ("decode_over_several_splits", "within_the_error_budget")
ALONE = ("a_row_alone", "beside_an_empty_one")
CAPACITY = ("spare_capacity",)

_MERGE = """\
    m_new = tl.maximum(m_i, m_s)
    m_base = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - m_base)
    beta = tl.exp2(m_s - m_base)
"""
_SPLITS = "plan.unsplit_size, plan.kv_split_size, plan.few_splits, plan.max_splits,"
_MINE = "mine = scratch + first_split // splits_per_program * step"
_COUNT = "return tl.maximum(tl.cdiv(cached, size), 1), size"
_EXISTS = "exists = in_tile & (partial + tl.zeros_like(rows) < num_partials)"
_ARRIVAL = """\
        arrival_ptr = arrivals_ptr + kv_head * tl.num_programs(1) + tile
        if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_partials - 1:
"""

MUTANTS = (
    Mutant(
        "M26",
        "SPLIT",
        "the number of splits is rounded down: the remainder of the keys is lost",
        "cached % kv_split_size != 0, more than one split's worth",
        (Edit(PRIMITIVES, _COUNT, _COUNT.replace("tl.cdiv(cached, size)", "cached // size")),),
        VALUES,
    ),
    Mutant(
        "M28",
        "SPLIT",
        "the merge takes base-2 logarithms for natural ones",
        "splits > 1",
        (Edit(PRIMITIVES, _MERGE, _MERGE.replace("exp2", "exp")),),
        VALUES,
    ),
    Mutant(
        "M29",
        "SPLIT",
        "the merge does not subtract the maximum",
        "splits > 1, logits beyond 88",
        (
            Edit(
                PRIMITIVES,
                _MERGE,
                _MERGE.replace("m_new = tl.maximum(m_i, m_s)", "m_new = tl.maximum(m_i, m_s) * 0.0")
                .replace("tl.exp2(m_i - m_base)", 'tl.where(m_i == -float("inf"), 0.0, tl.exp2(m_i))')
                .replace("tl.exp2(m_s - m_base)", "tl.exp2(m_s)"),
            ),
        ),
        VALUES,
    ),
    Mutant(
        "M31",
        "SPLIT",
        "partials are written by the row's own split count and read by the largest",
        "ragged batch with unequal split counts, or a second head",
        (
            Edit(
                SPLIT_KV,
                _MINE,
                "mine = kv_head * num_partials * step + tile * BLOCK_M\n"
                "        mine += first_split // splits_per_program * step",
            ),
        ),
        (*ALONE, *VALUES),
    ),
    Mutant(
        "M68",
        "RACE",
        "the split size depends on the number of batch rows",
        "batch >= 2, splits > 1",
        (Edit(WRAPPER, _SPLITS, _SPLITS.replace("plan.kv_split_size,", "plan.kv_split_size * (1 + (batch > 1)),")),),
        ALONE,
    ),
    Mutant(
        "M69",
        "RACE",
        "partials are summed in the order of arrival, as atomic adds would",
        "splits >= 3",
        (
            Edit(
                SPLIT_KV,
                _MINE,
                "arrival_ptr = arrivals_ptr + kv_head * tl.num_programs(1) + tile\n"
                '        ticket = tl.atomic_add(arrival_ptr, 1, sem="acq_rel") % 65536\n'
                "        mine = scratch + ticket * step",
            ),
            Edit(
                SPLIT_KV,
                _ARRIVAL,
                '        if tl.atomic_add(arrival_ptr, 65536, sem="acq_rel") // 65536 == num_partials - 1:\n',
            ),
        ),
        ("running_twice",),
        needs_gpu="the interpreter runs programs in one order",
    ),
    Mutant(
        "M72",
        "SPLIT",
        "the split size depends on the capacity of the cache",
        "splits > 1",
        (
            Edit(
                WRAPPER,
                _SPLITS,
                _SPLITS.replace(
                    "plan.kv_split_size,",
                    "max(plan.kv_split_size, "
                    "tuning.ceil_div(problem.k_cache.shape[2], 4 * plan.block_n) * plan.block_n),",
                ),
            ),
        ),
        CAPACITY,
    ),
    Mutant(
        "F30",
        "SPLIT",
        "every split counts the new tokens",
        "splits > 1",
        (
            Edit(SPLIT_KV, "            if start_n == 0:\n", "            if start_n == start:\n"),
            Edit(SPLIT_KV, "    elif is_last:\n", "    else:\n"),
        ),
        VALUES,
    ),
    Mutant(
        "F31",
        "SPLIT",
        "the first split takes the new tokens, too, when the last one is full",
        "splits > 1, cached % kv_split_size == 0",
        (
            Edit(
                SPLIT_KV,
                "    is_last = first_split + splits_per_program >= num_splits",
                "    is_last = first_split + splits_per_program >= num_splits\n"
                "    is_last |= (first_split == 0) & (cached % kv_split_size == 0)",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F32",
        "SPLIT",
        "a split that does not exist has the maximum 0",
        "several splits merged a step, negative logits",
        (
            Edit(
                PRIMITIVES,
                'm_i = tl.load(partial_m_ptr + at + rows, mask=exists, other=-float("inf"))',
                "m_i = tl.load(partial_m_ptr + at + rows, mask=exists, other=0.0)",
            ),
        ),
        ("lse_over_several_splits", *VALUES),
    ),
    Mutant(
        "F33",
        "SPLIT",
        "splits past the last one are merged, too",
        "several splits merged a step",
        (Edit(PRIMITIVES, _EXISTS, "exists = in_tile"),),
        VALUES,
    ),
    Mutant(
        "F34",
        "SPLIT",
        "the last program is recognised by the largest split count of the batch",
        "ragged batch with unequal split counts",
        (
            Edit(
                SPLIT_KV, _ARRIVAL, _ARRIVAL.replace("num_partials - 1", "tl.cdiv(grid_splits, splits_per_program) - 1")
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F35",
        "SPLIT",
        "the grid has as many splits as are full",
        "cached % kv_split_size != 0",
        (
            Edit(
                TUNING,
                "min(ceil_div(cached, size), self.few_splits)",
                "min(cached // size, self.few_splits)",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F36",
        "SPLIT",
        "the sums of weights are merged without rescaling",
        "splits > 1",
        (Edit(PRIMITIVES, "m_new, l_i * alpha + l_s * beta", "m_new, l_i + l_s"),),
        VALUES,
    ),
    Mutant(
        "F37",
        "SPLIT",
        "partials are kept in the input's format",
        "splits > 1, float16 or bfloat16",
        (
            Edit(
                SPLIT_KV,
                "+ in_partial, acc, mask=partial_mask)",
                "+ in_partial, acc.to(q.dtype).to(tl.float32), mask=partial_mask)",
            ),
        ),
        ("every_kernel_decodes_alike", *VALUES),
    ),
    Mutant(
        "F38",
        "SPLIT",
        "a split past the limit on their number keeps its length, and the rest is lost",
        "more splits' worth of keys than max_splits",
        (
            Edit(
                PRIMITIVES,
                "    wanted = tl.minimum(shortest, few_splits)\n",
                "    wanted = shortest\n",
            ),
            Edit(
                PRIMITIVES,
                "wanted = tl.minimum(tl.maximum(wanted, tl.cdiv(shortest, LONGEST)), max_splits)",
                "wanted = tl.maximum(wanted, tl.cdiv(shortest, LONGEST))",
            ),
        ),
        ("every_kernel_decodes_alike",),
    ),
    Mutant(
        "F39",
        "SPLIT",
        "row tiles of one head share their scratch",
        "splits > 1, q_len * group_size > BLOCK_M",
        (Edit(SPLIT_KV, "* grid_splits * step + tile * BLOCK_M\n", "* grid_splits * step\n"),),
        ("tiles_and_splits", *VALUES),
    ),
    Mutant(
        "F40",
        "RACE",
        "heads share an arrival counter",
        "splits > 1, more than one kv head",
        (Edit(SPLIT_KV, _ARRIVAL, _ARRIVAL.replace("kv_head", "b")),),
        VALUES,
        needs_gpu="the interpreter runs the splits of one head before those of the next",
    ),
    Mutant(
        "F364",
        "SPLIT",
        "the grid has the splits of the longest row, though whole tiles may leave a shorter one more",
        "ragged batch, splits that must grow, the longest row just past a multiple",
        (
            Edit(
                WRAPPER,
                "grid_splits = plan.grid_splits(problem.max_cached)",
                "grid_splits = plan.num_splits(problem.max_cached)",
            ),
        ),
        ("rows_of_fewer_splits", *VALUES),
    ),
)
