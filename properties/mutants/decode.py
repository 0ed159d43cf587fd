"""A decode step apart from longer chunks: one key without a product of tiles, stored before the cache is read."""

from __future__ import annotations

from properties.mutants.mutant import PRIMITIVES, SPLIT_KV, Edit, Mutant

VALUES = ("within_the_error_budget",)
BYTES = ("append_stores", "nothing_else_is_written")
PAST_THE_END = ("past_the_end",)
CANARY = ("nothing_else_is_written",)

_LOGIT = "one_logit = tl.sum(q.to(tl.float32) * k_one.to(tl.float32)[None, :], axis=1) * qk_scale"
_FOLDS = "attend_one_key(acc, m_i, l_i, one_logit, v_one, new_keys)"
_SLOT = "slot = cached.to(tl.int64)\n"
_STORED_K = "tl.store(k_cache_ptr + slot * stride_kcn + offs_d, k_one, mask=one_visible)"
_STORED_V = "tl.store(v_cache_ptr + slot * stride_vcn + offs_d, v_one, mask=one_visible)"
_LOADED_K = "k_one = tl.load(k_new_ptr + offs_d, mask=one_visible, other=0.0)"
_LOADED_V = "v_one = tl.load(v_new_ptr + offs_d, mask=one_visible, other=0.0)"
_STORES = "stores = is_last & (tile == 0) & ((flags & APPEND) != 0) & fits"
_VISIBLE = "tl.where(is_last, new_keys, 0)"
_ALL_COLUMNS = "tl.zeros([BLOCK_D], tl.int32) < new_keys"
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
    _split_kv(
        "F368",
        "NUMERIC",
        "the logit of a decode step's new token is not scaled",
        "split path, q_len == 1",
        _LOGIT,
        _LOGIT.removesuffix(" * qk_scale"),
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
    _split_kv(
        "F370",
        "NUMERIC",
        "the key of a decode step's new token is taken for its value",
        "split path, q_len == 1",
        _FOLDS,
        _FOLDS.replace("v_one", "k_one"),
        VALUES,
    ),
    Mutant(
        "F371",
        "NUMERIC",
        "the product of a decode step's new token is taken in the input's format",
        "split path, q_len == 1, float16 or bfloat16",
        (Edit(SPLIT_KV, "q.to(tl.float32) * k_one.to(tl.float32)[None, :]", "(q * k_one[None, :]).to(tl.float32)"),),
        VALUES,
    ),
    Mutant(
        "F373",
        "APPEND",
        "every split of a decode step stores the token where its own slots end",
        "split path, q_len == 1, splits > 1",
        (
            Edit(SPLIT_KV, _STORES, _STORES.replace("is_last & ", "")),
            Edit(SPLIT_KV, _VISIBLE, "new_keys"),
            Edit(SPLIT_KV, _SLOT, _SLOT.replace("cached", "stop")),
        ),
        BYTES,
    ),
    Mutant(
        "F374",
        "APPEND",
        "a decode step stores its token's padding columns over the next slot",
        "split path, q_len == 1, head_dim not a power of two",
        tuple(Edit(SPLIT_KV, anchor, anchor.replace("one_visible", _ALL_COLUMNS)) for anchor in (_STORED_K, _STORED_V)),
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
        _STORED_V,
        _STORED_V.replace("stride_vcn", "stride_kcn"),
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
    _split_kv(
        "F378",
        "TAIL",
        "the new key of a decode step is loaded past head_dim and meets query columns of 0",
        "split path, q_len == 1, head_dim not a power of two",
        _LOADED_K,
        _LOADED_K.replace("one_visible", _ALL_COLUMNS),
        (*PAST_THE_END, "a_non_finite"),
    ),
    _split_kv(
        "F379",
        "TAIL",
        "the new value of a decode step is loaded past head_dim into columns that nobody stores",
        "split path, q_len == 1, head_dim not a power of two",
        _LOADED_V,
        _LOADED_V.replace("one_visible", _ALL_COLUMNS),
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
