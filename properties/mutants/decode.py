"""A decode step apart from longer chunks: one key without a product of tiles, stored before the cache is read."""

from __future__ import annotations

from properties.mutants.mutant import PRIMITIVES, SPLIT_KV, Edit, Mutant

VALUES = ("within_the_error_budget",)
BYTES = ("append_stores", "nothing_else_is_written")
PAST_THE_END = ("past_the_end",)
CANARY = ("nothing_else_is_written",)

_LOGIT = "logit = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * qk_scale"
_FOLDED = "acc, m_i, l_i, v.to(tl.float32)[None, :],"
_AT_FIRST_TILE = "            if start_n == 0:\n"
_WITHOUT_TILES = "        if cached == 0:\n"
_SLOT = "slot = cached.to(tl.int64)\n"
_STORED_K = "tl.store(k_slot_ptrs, k, mask=visible)"
_STORED_V = "tl.store(v_slot_ptrs, v, mask=visible)"
_V_SLOT = "v_cache_ptr + slot * stride_vcn + offs_d, stores,"
_LOADED_K = "k = tl.load(k_ptrs, mask=visible, other=0.0)"
_LOADED_V = "v = tl.load(v_ptrs, mask=visible, other=0.0)"
_STORES = "stores = takes_new & (tile == 0) & ((flags & APPEND) != 0) & fits"
_ALL_COLUMNS = "mask=tl.zeros_like(in_head).to(tl.int32) < num_keys"
_ROW = """\
    h = tl.program_id(0) // row_programs % num_kv_heads
    b = tl.program_id(0) // row_programs // num_kv_heads
"""


def _split_kv(
    id_: str, category: str, change: str, where: str, anchor: str, replacement: str, laws: tuple[str, ...]
) -> Mutant:
    return Mutant(id_, category, change, where, (Edit(SPLIT_KV, anchor, replacement),), laws)


MUTANTS = (
    Mutant(
        "F367",
        "NUMERIC",
        "the new token of a decode step has no weight in the sum",
        "split path, q_len == 1",
        (
            Edit(
                PRIMITIVES,
                'tl.where(exists, logit, -float("inf")), tl.where(exists, 1.0, 0.0)',
                'tl.where(exists, logit, -float("inf")), tl.zeros_like(logit)',
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F368",
        "NUMERIC",
        "the logit of a decode step's new token is not scaled",
        "split path, q_len == 1",
        (Edit(PRIMITIVES, _LOGIT, _LOGIT.removesuffix(" * qk_scale")),),
        VALUES,
    ),
    Mutant(
        "F369",
        "MASK",
        "a single query takes a new token although there is none",
        "attention without a cache, one query",
        (Edit(PRIMITIVES, "exists = tl.zeros_like(logit) < num_keys", "exists = tl.zeros_like(logit) < 1"),),
        ("without_a_cache", *VALUES),
    ),
    Mutant(
        "F370",
        "NUMERIC",
        "the key of a decode step's new token is taken for its value",
        "split path, q_len == 1",
        (Edit(PRIMITIVES, _FOLDED, _FOLDED.replace("v.to", "k.to")),),
        VALUES,
    ),
    Mutant(
        "F371",
        "NUMERIC",
        "the product of a decode step's new token is taken in the input's format",
        "split path, q_len == 1, float16 or bfloat16",
        (Edit(PRIMITIVES, "q.to(tl.float32) * k.to(tl.float32)[None, :]", "(q * k[None, :]).to(tl.float32)"),),
        VALUES,
    ),
    Mutant(
        "F373",
        "APPEND",
        "a decode step stores the token where the slots of its program end",
        "split path, q_len == 1, several programs a row",
        (Edit(SPLIT_KV, _SLOT, _SLOT.replace("cached", "stop")),),
        BYTES,
    ),
    _split_kv(
        "F455",
        "SPLIT",
        "a decode step's new token is taken before the second tile of its row, or not at all",
        "split path, q_len == 1, cached slots",
        _AT_FIRST_TILE,
        _AT_FIRST_TILE.replace("== 0", "== BLOCK_N"),
        VALUES,
    ),
    _split_kv(
        "F456",
        "EMPTY",
        "a decode step's new token is not seen where nothing is cached",
        "split path, q_len == 1, a row without cached slots",
        _WITHOUT_TILES,
        _WITHOUT_TILES.replace("== 0", "< 0"),
        VALUES,
    ),
    _split_kv(
        "F457",
        "NUMERIC",
        "a decode step's new token is taken before the first tile and once more after the last",
        "split path, q_len == 1, cached slots",
        _WITHOUT_TILES,
        "        if takes_new:\n",
        VALUES,
    ),
    _split_kv(
        "F458",
        "APPEND",
        "a decode step's new token is not stored where the first split of its row is not the last",
        "split path, q_len == 1, splits > 1",
        "takes_new = first_split == 0 if ONE_QUERY else is_last",
        "takes_new = is_last",
        BYTES,
    ),
    _split_kv(
        "F459",
        "LAYOUT",
        "the query of every tile but the first is loaded from farther back",
        "split path, more than one tile of cached slots",
        "q_ptrs + tl.minimum(start_n, 0)",
        "q_ptrs + tl.minimum(start_n, 1)",
        VALUES,
    ),
    Mutant(
        "F374",
        "APPEND",
        "a decode step stores its token's padding columns over the next slot",
        "split path, q_len == 1, head_dim not a power of two",
        tuple(
            Edit(PRIMITIVES, anchor, anchor.replace("mask=visible", _ALL_COLUMNS)) for anchor in (_STORED_K, _STORED_V)
        ),
        BYTES,
    ),
    _split_kv(
        "F375",
        "APPEND",
        "a decode step stores its token one slot too far",
        "split path, q_len == 1",
        _SLOT,
        _SLOT.replace("\n", " + 1\n"),
        BYTES,
    ),
    _split_kv(
        "F376",
        "APPEND",
        "a decode step stores its value with the stride of the keys",
        "key and value buffers of different strides",
        _V_SLOT,
        _V_SLOT.replace("stride_vcn", "stride_kcn"),
        BYTES,
    ),
    _split_kv(
        "F377",
        "APPEND",
        "a decode step stores its token although the cache is not to be updated",
        "update_cache=False, q_len == 1",
        _STORES,
        _STORES.replace("((flags & APPEND) != 0)", "(slot_limit > 0)"),
        CANARY,
    ),
    Mutant(
        "F378",
        "TAIL",
        "the new key of a decode step is loaded past head_dim and meets query columns of 0",
        "split path, q_len == 1, head_dim not a power of two",
        (Edit(PRIMITIVES, _LOADED_K, _LOADED_K.replace("mask=visible", _ALL_COLUMNS)),),
        (*PAST_THE_END, "a_non_finite"),
    ),
    Mutant(
        "F379",
        "TAIL",
        "the new value of a decode step is loaded past head_dim into columns that nobody stores",
        "split path, q_len == 1, head_dim not a power of two",
        (Edit(PRIMITIVES, _LOADED_V, _LOADED_V.replace("mask=visible", _ALL_COLUMNS)),),
        PAST_THE_END,
    ),
    _split_kv(
        "F380",
        "INT",
        "the slot of a decode step's token is a 32-bit number",
        "offsets beyond 2**31",
        _SLOT,
        _SLOT.replace(".to(tl.int64)", ""),
        ("two_to_the_31",),
    ),
    Mutant(
        "F381",
        "EMPTY",
        "a decode step without a new token attends to the cache",
        "split path, q_len == 1, new_lens 0",
        (Edit(PRIMITIVES, "real = in_tile & (query < num_queries)", "real = in_tile"),),
        ("sees_no_key", *VALUES),
    ),
    Mutant(
        "F382",
        "TAIL",
        "a decode step counts the row past the last head, too",
        "split path, q_len == 1, group_size no multiple of BLOCK_M",
        (Edit(PRIMITIVES, "in_tile = rows < group_size", "in_tile = rows <= group_size"),),
        (*CANARY, *VALUES),
    ),
    _split_kv(
        "F383",
        "GQA",
        "a program of the split path takes its kv head for its batch row",
        "batch >= 2 or several kv heads",
        _ROW,
        _ROW.replace("    h =", "    x =").replace("    b =", "    h =").replace("    x =", "    b ="),
        VALUES,
    ),
)
