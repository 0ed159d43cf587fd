"""Changes that break no promise: a law that objects raises a false alarm."""

from __future__ import annotations

from properties.mutants.mutant import PREFILL, PRIMITIVES, SPLIT_KV, TUNING, Edit, Mutant


def _neutral(id_: str, change: str, *edits: Edit) -> Mutant:
    return Mutant(id_, "NEUTRAL", change, "nowhere", edits, neutral=True)


_BACKWARDS = """\
{indent}for done in range({start}, {stop}, BLOCK_N):
{indent}    start_n = {start} + (tl.cdiv({stop} - {start}, BLOCK_N) - 1) * BLOCK_N - (done - {start})
"""
_LOGITS = """\
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale  # [BLOCK_M, BLOCK_N]
"""
_MASKED = """\
        logits = tl.where(visible, logits, -float("inf"))
    if not"""
_HEAD = "h = tl.program_id(0) // grid_splits % num_kv_heads"
_ROW = "b = tl.program_id(0) // grid_splits // num_kv_heads"


def _reversed(file: str, start: str, stop: str, loop: str = "range({}, {}, BLOCK_N)") -> Edit:
    anchor = f"    for start_n in {loop.format(start, stop)}:\n"
    return Edit(file, anchor, _BACKWARDS.format(indent="    ", start=start, stop=stop))


def _finite_start(file: str, after: str) -> Edit:
    anchor = (
        '    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)\n    l_i = tl.zeros([BLOCK_M], tl.float32)\n    '
        + after
    )
    return Edit(file, anchor, anchor.replace('-float("inf")', "-1e30"))


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
        _reversed(SPLIT_KV, "start", "stop"),
        _reversed(PRIMITIVES, "full_stop", "stop", "tl.range({}, {}, BLOCK_N, num_stages=STAGES)"),
    ),
    _neutral(
        "N4",
        "the running maximum starts at -1e30",
        _finite_start(SPLIT_KV, "# Every query sees"),
        _finite_start(PREFILL, "if tile * BLOCK_M"),
    ),
    _neutral(
        "N5",
        "a row that is too long for one split has splits half as long",
        Edit(TUNING, "MIN_SPLITS = 4\n", "MIN_SPLITS = 8\n"),
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
        "every split of a decode step stores its token, to the same slot",
        Edit(SPLIT_KV, "stores = is_last & (tile == 0)", "stores = (tile == 0)"),
        Edit(SPLIT_KV, "tl.where(is_last, new_keys, 0)", "new_keys"),
    ),
    _neutral(
        "N8",
        "programs count batch rows before kv heads",
        Edit(
            SPLIT_KV,
            _HEAD,
            "h = tl.program_id(0) // grid_splits // (tl.num_programs(0) // grid_splits // num_kv_heads)",
        ),
        Edit(
            SPLIT_KV, _ROW, "b = tl.program_id(0) // grid_splits % (tl.num_programs(0) // grid_splits // num_kv_heads)"
        ),
    ),
    _neutral(
        "N9",
        "the kernel does not know the fewest splits of a long row",
        Edit(PRIMITIVES, "tl.maximum(tl.cdiv(cached, kv_split_size), min_splits)", "tl.cdiv(cached, kv_split_size)"),
    ),
)
