"""Which keys a query sees."""

from __future__ import annotations

from properties.mutants.mutant import PREFILL, PRIMITIVES, WRAPPER, Edit, Mutant

VALUES = ("within_the_error_budget",)

_ROW_LIMIT = "row_limit = tl.minimum(tl.maximum(query + causal_offset + 1, 0), num_new_keys)"
_MASKED_LOOP = "for start_n in tl.range(full_stop, stop, BLOCK_N, num_stages=STAGES):"

MUTANTS = (
    Mutant(
        "M12",
        "MASK",
        "a query does not see its own key",
        "causal",
        (Edit(PRIMITIVES, _ROW_LIMIT, _ROW_LIMIT.replace("causal_offset + 1", "causal_offset")),),
        VALUES,
    ),
    Mutant(
        "M11",
        "MASK",
        "the causal mask starts at the top left",
        "attention with kv_len != q_len",
        (
            Edit(
                WRAPPER,
                "diagonal = min(q_len, kv_len) if is_causal else 0",
                "diagonal = kv_len if is_causal else 0",
            ),
            Edit(WRAPPER, "causal_offset=diagonal - q_len", "causal_offset=0"),
        ),
        ("without_a_cache",),
    ),
    Mutant(
        "M13",
        "MASK",
        "the causal loop ends with the tile of the first row's diagonal",
        "BLOCK_M > BLOCK_N, q_len > BLOCK_N, prefill",
        (
            Edit(
                PRIMITIVES,
                _MASKED_LOOP,
                "for start_n in range(\n"
                "        full_stop, tl.minimum(stop, tl.cdiv(common_limit, BLOCK_N) * BLOCK_N) if CAUSAL else stop,"
                " BLOCK_N\n    ):",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "M16",
        "MASK",
        "all queries of a short chunk see the new keys that the last one sees",
        "2 <= q_len, split path, causal",
        (
            Edit(
                PRIMITIVES,
                'logits = tl.where(offs_n[None, :] < row_limit[:, None], logits, -float("inf"))',
                'logits = tl.where((offs_n < tl.max(row_limit, axis=0))[None, :], logits, -float("inf"))',
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F10",
        "MASK",
        "queries that stand before the first key see it",
        "attention with kv_len < q_len, causal",
        (Edit(PRIMITIVES, _ROW_LIMIT, _ROW_LIMIT.replace("query + causal_offset", "query")),),
        ("without_a_cache",),
    ),
    Mutant(
        "F11",
        "MASK",
        "tiles on the diagonal count as seen by every row of the tile",
        "prefill, causal, more queries than BLOCK_N",
        (
            Edit(
                PRIMITIVES,
                "common_limit = tl.minimum(tl.maximum(first + causal_offset + 1",
                "common_limit = tl.minimum(tl.maximum(last + causal_offset + 1",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F12",
        "MASK",
        "two queries at once are not masked",
        "q_len == 2, causal",
        (Edit(WRAPPER, "0 if is_causal else q_len", "0 if is_causal and q_len != 2 else q_len"),),
        VALUES,
    ),
    Mutant(
        "F13",
        "MASK",
        "a chunk sees only the cached keys up to its own index",
        "prefill, causal, cached keys",
        (
            Edit(
                PREFILL,
                "tl.zeros([BLOCK_M], tl.int32) + cached, qk_scale",
                "tl.zeros([BLOCK_M], tl.int32) + tl.minimum(cached, query + 1 + causal_offset), qk_scale",
            ),
            Edit(PREFILL, "v_cache_ptr, 0, cached, cached,", "v_cache_ptr, 0, cached, 0,"),
        ),
        VALUES,
    ),
    Mutant(
        "F14",
        "MASK",
        "hidden keys get the finite logit -10000",
        "prefill or cached tail, strongly negative logits",
        (
            Edit(
                PRIMITIVES,
                '        logits = tl.where(visible, logits, -float("inf"))',
                "        logits = tl.where(visible, logits, -10000.0)",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F15",
        "MASK",
        "a short chunk's padding tokens take part in the softmax",
        "split path, q_len no power of two or new_lens given",
        (
            Edit(
                PRIMITIVES,
                'logits = tl.where(offs_n[None, :] < row_limit[:, None], logits, -float("inf"))',
                "logits = tl.where(offs_n[None, :] < row_limit[:, None], logits, 0.0)",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F16",
        "MASK",
        "query heads of a group share the diagonal of the next query",
        "split path, causal, group_size > 1",
        (
            Edit(
                PRIMITIVES,
                _ROW_LIMIT,
                _ROW_LIMIT.replace("query + causal_offset + 1", "(rows + 1) // group_size + causal_offset"),
            ),
        ),
        VALUES,
    ),
)
