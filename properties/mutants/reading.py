"""What reading the sources line by line came up with after the other lists were complete, and the laws were weak on."""

from __future__ import annotations

from properties.mutants.mutant import (
    CACHE,
    PREFILL,
    PRIMITIVES,
    SPLIT_KV,
    TUNING,
    VALIDATION,
    WRAPPER,
    Edit,
    Mutant,
)

REFUSED = ("must_be_refused",)
ATTENTION_REFUSED = ("cache_refuses",)
STREAM = ("steady_stream",)
SEES = ("sees_no_key", "attention_without_a_cache")

_SEES_KEYS = "(cached > 0) | (row_limit > 0)"
_OLD_BUFFERS = 'for name, tensor in (("past_key_value[0]", k_cache), ("past_key_value[1]", v_cache)):'
_HELD = '        validation.check_lengths("past_key_value.seq_lens", past.seq_lens, batch, query.device)\n'
_ALIKE = '        validation.check_alike(name, tensor, q, "q")\n'
_FLAGS = '    validation.check_flag("is_causal", is_causal)\n    validation.check_flag("return_lse", return_lse)\n'


def _fault(
    id_: str, category: str, change: str, where: str, file: str, anchor: str, replacement: str, laws: tuple[str, ...]
) -> Mutant:
    return Mutant(id_, category, change, where, (Edit(file, anchor, replacement),), laws)


def _blind(id_: str, file: str, where: str) -> Mutant:
    change = "a causal query before the first key is divided by its sum of weights, 0"
    return _fault(
        id_, "EMPTY", change, where, file, _SEES_KEYS, _SEES_KEYS.replace("(row_limit >", "(row_limit >="), SEES
    )


MUTANTS = (
    _blind("F334", SPLIT_KV, "attention, causal, few queries and fewer keys"),
    _blind("F335", PREFILL, "attention, causal, many queries and fewer keys"),
    _fault(
        "F336",
        "SPLIT",
        "a split is one tile longer than the number of tiles it has to take, not as long",
        "several splits",
        PRIMITIVES,
        "tl.cdiv(tl.cdiv(cached, tl.maximum(wanted, 1)), BLOCK_N), 1) * BLOCK_N",
        "tl.cdiv(tl.cdiv(cached, tl.maximum(wanted, 1)), BLOCK_N), 1) + BLOCK_N",
        ("every_kernel_decodes_alike",),
    ),
    Mutant(
        "F337",
        "STATE",
        "a launch that read strided lengths is repeated for those of the returned cache",
        "a KVCache made from every second element of a larger tensor, two calls",
        (Edit(CACHE, "call.reads_rows if lengths is None else call.reads(lengths)", "True"),),
        ("how_a_cache_holds",),
    ),
    _fault(
        "F338",
        "STATE",
        "there are arrival counters for one tile of rows",
        "17 to 32 rows a kv head in tiles of 16, several splits",
        WRAPPER,
        "_arrival_counters(problem, batch * num_kv_heads * row_tiles)",
        "_arrival_counters(problem, batch * num_kv_heads)",
        STREAM,
    ),
    _fault(
        "F339",
        "STATE",
        "a roll-back between calls that are alike is ignored",
        "a KVCache with seq_lens given, after two calls of the same shape",
        WRAPPER,
        "past_key_value) is KVCache and seq_lens is None and new_lens",
        "past_key_value) is KVCache and new_lens",
        STREAM,
    ),
    _fault(
        "F340",
        "STATE",
        "a plan made before one was forced is used under it",
        "a call, then the same one with another kernel forced",
        TUNING,
        "    _generation += 1\n    try:",
        "    try:",
        ("another_kernel",),
    ),
    _fault(
        "F341",
        "NUMERIC",
        "what was summed before the maximum rose keeps a weight of 2**-126",
        "a maximum that rises by more, large values before it",
        PRIMITIVES,
        "alpha = tl.exp2(m_i - m_base)  # [BLOCK_M]; 0 on the first visible tile",
        "alpha = tl.exp2(tl.maximum(m_i - m_base, -126.0))",
        ("far_below",),
    ),
    _fault(
        "F342",
        "VALID",
        "the buffer of values is not compared with that of keys",
        "a pair of buffers that differ in dtype or shape",
        WRAPPER,
        _OLD_BUFFERS,
        'for name, tensor in (("past_key_value[0]", k_cache),):',
        REFUSED,
    ),
    _fault(
        "F343",
        "VALID",
        "the lengths that a KVCache holds are not looked at",
        "a KVCache with lengths of another dtype or batch",
        WRAPPER,
        _HELD,
        "",
        REFUSED,
    ),
    _fault(
        "F344",
        "VALID",
        "attention takes keys and values of another dtype",
        "attention",
        WRAPPER,
        _ALIKE,
        "        assert name and tensor is not None\n",
        ATTENTION_REFUSED,
    ),
    _fault(
        "F345",
        "VALID",
        "attention takes values of another shape",
        "attention",
        WRAPPER,
        '    validation.check_shape("v", v, k.shape, "of k")\n',
        "",
        ATTENTION_REFUSED,
    ),
    _fault("F346", "VALID", "attention takes an int for a bool", "attention", WRAPPER, _FLAGS, "", ATTENTION_REFUSED),
    _fault(
        "F347",
        "VALID",
        "a head of more than 256 elements is accepted",
        "head_dim 257",
        VALIDATION,
        "if not 1 <= head_dim <= MAX_HEAD_DIM:",
        "if head_dim < 1:",
        REFUSED,
    ),
    _fault(
        "F348",
        "VALID",
        "keys without a head are divided among the query heads",
        "no kv head",
        VALIDATION,
        "    if num_kv_heads < 1:\n",
        "    if num_kv_heads < 0:\n",
        REFUSED,
    ),
    _fault(
        "F349",
        "VALID",
        "a sparse tensor is accepted",
        "a query in another layout",
        VALIDATION,
        "if value.layout != torch.strided:",
        "if value.layout == torch.sparse_csr:",
        REFUSED,
    ),
)
