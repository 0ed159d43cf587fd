"""Faults of the kernels for Hopper, which only a GPU of that kind can run."""

from __future__ import annotations

from properties.mutants.mutant import PREFILL_SM90, SPLIT_SM90, Edit, Mutant

NEEDS = "the interpreter does not run Gluon"
EVERY = ("every_kernel",)


def _fault(id_: str, category: str, change: str, where: str, anchor: str, replacement: str) -> Mutant:
    edits = (Edit(PREFILL_SM90, anchor, replacement),)
    return Mutant(id_, category, change, where, edits, EVERY, needs_gpu=NEEDS, needs_kernel="prefill_sm90 64")


def _decode_fault(id_: str, category: str, change: str, where: str, anchor: str, replacement: str) -> Mutant:
    edits = (Edit(SPLIT_SM90, anchor, replacement),)
    return Mutant(id_, category, change, where, edits, EVERY, needs_gpu=NEEDS, needs_kernel="split_sm90")


MUTANTS = (
    _fault(
        "F470",
        "MASK",
        "Hopper: a masked tile shows one key too many",
        "prompts at head_dim 128",
        "gl.where(keys[None, :] < limit[:, None], logits,",
        "gl.where(keys[None, :] <= limit[:, None], logits,",
    ),
    _fault(
        "F471",
        "TAIL",
        "Hopper: the tile on the end of the cached keys counts as whole",
        "cached keys that do not fill tiles",
        "gl.where(segment == 0, cached // BLOCK_N,",
        "gl.where(segment == 0, cached_tiles,",
    ),
    _fault(
        "F473",
        "NUMERIC",
        "Hopper: rows that met a value that is not finite are not attended again",
        "NaN or Inf values beside the diagonal",
        "if gl.max(nonfinite_s.index(consumer).load(FLAG), axis=0) > 0:",
        "if gl.max(nonfinite_s.index(consumer).load(FLAG), axis=0) > 1:",
    ),
    _fault(
        "F474",
        "NUMERIC",
        "Hopper: the accumulator is not rescaled with the maximum",
        "more than one tile of keys",
        "        mbarrier.arrive(v_free.index(before), count=1)\n"
        "        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]\n",
        "        mbarrier.arrive(v_free.index(before), count=1)\n",
    ),
    _fault(
        "F475",
        "APPEND",
        "Hopper: the token whose first row is in the next tile is appended by none",
        "several tiles of rows",
        "last_token = gl.minimum((first_row + ROWS + group_size - 1) // group_size, append_stop)",
        "last_token = gl.minimum((first_row + ROWS - 1) // group_size, append_stop)",
    ),
    _fault(
        "F476",
        "GQA",
        "Hopper: every kv head reads the cached keys and values of the first",
        "several kv heads",
        "copy_box(cache_desc, [b, h, start_n, 0], barrier, tile_s)",
        "copy_box(cache_desc, [b, 0, start_n, 0], barrier, tile_s)",
    ),
    _decode_fault(
        "F480",
        "MASK",
        "Hopper: the last tile of a decode step shows a key too many, which is 0",
        "rows that do not fill tiles",
        "(keys < visible_keys - tile * BLOCK_N)[:, None]",
        "(keys <= visible_keys - tile * BLOCK_N)[:, None]",
    ),
    _decode_fault(
        "F481",
        "TAIL",
        "Hopper: the last tile of a decode step is copied whole, whatever lies behind the row",
        "rows that do not fill tiles",
        "    if left >= BLOCK_N:",
        "    if left > 0:",
    ),
    _decode_fault(
        "F482",
        "APPEND",
        "Hopper: the new token of a decode step is stored one slot too far",
        "decode steps that append",
        "slot64 = cached.to(gl.int64)",
        "slot64 = (cached + 1).to(gl.int64)",
    ),
    _decode_fault(
        "F483",
        "NUMERIC",
        "Hopper: the accumulator of a decode step is not rescaled with the maximum",
        "more than one tile of keys",
        "return mma_v2(v_t, p, acc * alpha[None, :]), m_new, l_i",
        "return mma_v2(v_t, p, acc), m_new, l_i",
    ),
    _decode_fault(
        "F484",
        "SPLIT",
        "Hopper: a program that has its whole row forgets all groups of splits but the last",
        "rows of more than four splits",
        "row_acc, row_m, row_l = merge_partial(row_acc, row_m, row_l, group_acc, group_m, group_l)",
        "row_acc, row_m, row_l = group_acc, group_m, group_l",
    ),
    _decode_fault(
        "F485",
        "GQA",
        "Hopper: every kv head of a decode step reads the cached values of the first",
        "several kv heads",
        "copy_box(v_desc, [b, h, start_n, 0]",
        "copy_box(v_desc, [b, 0, start_n, 0]",
    ),
    _decode_fault(
        "F486",
        "SPLIT",
        "Hopper: every program of a row takes the new token, not that of the last split alone",
        "decode steps over several splits",
        "takes_new = last_split == num_splits",
        "takes_new = last_split <= num_splits",
    ),
)
