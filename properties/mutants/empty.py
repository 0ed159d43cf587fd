"""Rows, tiles and splits without keys."""

from __future__ import annotations

from properties.mutants.mutant import PREFILL, PRIMITIVES, SPLIT_KV, Edit, Mutant

VALUES = ("within_the_error_budget", "sees_no_key")

_LSE = "tl.store(lse_ptr + out_row, lse, mask=in_tile)"
_NEIGHBOUR = """\
    before = tl.load(
        seq_lens_ptr + tl.maximum(b - 1, 0) * stride_seq, mask=(flags & HAS_SEQ_LENS) != 0, other=1
    )
    lse_ptr -= tl.where((b > 0) & (before == 0), num_kv_heads * group_size * q_len, 0)
"""
_WHOLE_ROW = "    has_whole_row = splits_per_program >= num_splits\n"
_PREFILL_STORES = "    store_output(\n"
_SEES_KEYS = "real & ((cached > 0) | (row_limit > 0))"

MUTANTS = (
    Mutant(
        "M22",
        "EMPTY",
        "the rescale factor is -inf - -inf while a row has seen no key, and finish asks the sum of weights",
        "a row sees no key of its first tile",
        (
            Edit(
                PRIMITIVES,
                "    # While a row has seen no key, m_new is -inf, and (-inf) - (-inf) is NaN.\n"
                '    m_base = tl.where(m_new == -float("inf"), 0.0, m_new)',
                "    m_base = m_new",
            ),
            Edit(
                PRIMITIVES,
                "    ln_2: tl.constexpr = 0.6931471805599453",
                "    ln_2: tl.constexpr = 0.6931471805599453\n"
                "    row_sees_keys = row_sees_keys & (l_i > 0) | (l_i != l_i)",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "M23",
        "EMPTY",
        "a row without keys returns early and stores nothing",
        "seq_lens[b] + new_lens[b] == 0",
        (
            Edit(
                SPLIT_KV,
                "    if first_split >= num_splits:\n",
                "    if (first_split >= num_splits) | (cached + new_keys == 0):\n",
            ),
            Edit(
                PREFILL,
                "    query, head, in_tile, real, row_limit, common_limit, new_stop = tile_rows(",
                "    if cached + new_keys == 0:\n        return\n"
                "    query, head, in_tile, real, row_limit, common_limit, new_stop = tile_rows(",
            ),
        ),
        ("sees_no_key", "within_the_error_budget"),
    ),
    Mutant(
        "M25",
        "EMPTY",
        "after an empty row the LSE goes to the neighbour's place",
        "batch >= 2, one row with nothing cached",
        (
            Edit(SPLIT_KV, _WHOLE_ROW, _WHOLE_ROW + _NEIGHBOUR),
            Edit(PREFILL, _PREFILL_STORES, _NEIGHBOUR + _PREFILL_STORES),
        ),
        VALUES,
    ),
    Mutant(
        "F20",
        "EMPTY",
        "a query without keys is divided by its sum of weights, 0",
        "a row or query that sees no key",
        (
            Edit(
                PRIMITIVES,
                "out = tl.where(row_sees_keys[:, None], acc / tl.where(row_sees_keys, l_i, 1.0)[:, None], 0.0)",
                "out = acc / l_i[:, None]",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F21",
        "EMPTY",
        "the LSE of a query without keys is 0",
        "a row or query that sees no key",
        (Edit(PRIMITIVES, '(m_i + tl.log2(l_i)) * ln_2, -float("inf"))', "(m_i + tl.log2(l_i)) * ln_2, 0.0)"),),
        VALUES,
    ),
    Mutant(
        "F22",
        "EMPTY",
        "padding queries of a short chunk attend to the cache",
        "split path, new_lens < q_len, cached keys",
        (
            Edit(SPLIT_KV, _SEES_KEYS, _SEES_KEYS.removeprefix("real & ")),
            Edit(SPLIT_KV, "real_m & ((cached > 0) | (row_limit_m > 0))", "(cached > 0) | (row_limit_m > 0)"),
        ),
        VALUES,
    ),
    Mutant(
        "F23",
        "EMPTY",
        "padding queries of a long chunk attend to the cache",
        "prefill, new_lens < q_len, cached keys",
        (Edit(PREFILL, _SEES_KEYS, _SEES_KEYS.removeprefix("real & ")),),
        VALUES,
    ),
    Mutant(
        "F24",
        "EMPTY",
        "the LSE of padding queries is not written",
        "new_lens < q_len",
        (Edit(PRIMITIVES, _LSE, _LSE.replace("mask=in_tile", "mask=in_tile & row_sees_keys")),),
        VALUES,
    ),
    Mutant(
        "F25",
        "EMPTY",
        "a long chunk on an empty cache counts as seeing no key",
        "prefill, nothing cached",
        (Edit(PREFILL, _SEES_KEYS, "real & (cached > 0)"),),
        VALUES,
    ),
    Mutant(
        "F26",
        "EMPTY",
        "a row with nothing cached has no split, so that nobody attends to its new tokens",
        "split path, a row with nothing cached",
        (
            Edit(
                PRIMITIVES,
                "return tl.maximum(tl.cdiv(cached, size), 1), size",
                "return tl.cdiv(cached, size), size",
            ),
        ),
        VALUES,
    ),
)
