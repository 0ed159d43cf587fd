"""Casts to 64 bits, one by one: each where neighbours along one axis lie 2**31 elements apart."""

from __future__ import annotations

from properties.mutants.mutant import APPEND, PREFILL, PRIMITIVES, SPLIT_KV, WRAPPER, Edit, Mutant

LAWS = ("two_to_the_31",)


def _narrow(id_: str, file: str, anchor: str, replacement: str, what: str) -> Mutant:
    return Mutant(
        id_, "INT", f"{what} is a 32-bit number", "offsets beyond 2**31", (Edit(file, anchor, replacement),), LAWS
    )


_QUERY = "(q_head * stride_qh + query.to(tl.int64) * stride_qm)"
_SHORT_QUERY = "(head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qm)"
_WIDE = "any(max(plan.block_n, plan.block_new) * t.stride(2) >= 2**31 for t in sources[1:])"
_LARGER = "max(plan.block_n, plan.block_new)"
_LENGTH = "load_length(seq_lens_ptr, b.to(tl.int64) * stride_seq,"
_NEW_LENGTH = "load_length(new_lens_ptr, b.to(tl.int64) * stride_new,"
_CACHE_ROW = "k_cache_ptr += b64 * stride_kcb + h64 * stride_kch"
_NEW_ROW = "v_new_ptr += b64 * stride_vnb + h64 * stride_vnh"

MUTANTS = (
    _narrow("F230", PREFILL, _QUERY, _QUERY.replace(".to(tl.int64)", ""), "the offset of a query of a long chunk"),
    _narrow(
        "F231",
        SPLIT_KV,
        _SHORT_QUERY,
        _SHORT_QUERY.replace("query.to(tl.int64)", "query"),
        "the offset of a query of a short chunk",
    ),
    _narrow("F232", PREFILL, _CACHE_ROW, _CACHE_ROW.replace("b64", "b"), "the offset of a long chunk's cache row"),
    _narrow("F233", SPLIT_KV, _CACHE_ROW, _CACHE_ROW.replace("h64", "h"), "the offset of a decode step's head"),
    _narrow("F234", SPLIT_KV, _NEW_ROW, _NEW_ROW.replace("b64", "b"), "the offset of a row's new values"),
    _narrow(
        "F235",
        PRIMITIVES,
        "v_tile_ptr = v_ptr + tl.cast(start_n, tl.int64) * stride_vn",
        "v_tile_ptr = v_ptr + start_n * stride_vn",
        "the offset of a tile of values",
    ),
    _narrow("F236", WRAPPER, _WIDE, _WIDE.replace("[1:]", "[1:3]"), "an offset inside a tile of new tokens"),
    _narrow("F237", WRAPPER, _WIDE, _WIDE.replace("[1:]", "[3:]"), "an offset inside a tile of cached tokens"),
    _narrow(
        "F238",
        PRIMITIVES,
        "    slot = (first_slot + offs_n).to(tl.int64)[:, None]\n    tl.store",
        "    slot = (first_slot + offs_n)[:, None]\n    tl.store",
        "the slot of a short chunk's token",
    ),
    _narrow(
        "F239",
        PRIMITIVES,
        "        slot = (first_slot + offs_n).to(tl.int64)[:, None]\n        k = ",
        "        slot = (first_slot + offs_n)[:, None]\n        k = ",
        "the slot of a long chunk's token",
    ),
    _narrow(
        "F240",
        PRIMITIVES,
        "source = offs_n.to(tl.int64)[:, None]",
        "source = offs_n[:, None]",
        "the offset of a token to append",
    ),
    _narrow("F241", APPEND, "b64 = b.to(tl.int64)", "b64 = b", "the row of a separate append"),
    _narrow("F242", APPEND, "h64 = h.to(tl.int64)", "h64 = h", "the head of a separate append"),
    _narrow(
        "F330", WRAPPER, _WIDE, _WIDE.replace(_LARGER, "plan.block_n"), "an offset inside a larger tile of new tokens"
    ),
    _narrow(
        "F331",
        WRAPPER,
        _WIDE,
        _WIDE.replace(_LARGER, "plan.block_new"),
        "an offset inside a larger tile of cached ones",
    ),
    _narrow("F332", PRIMITIVES, _LENGTH, _LENGTH.replace(".to(tl.int64)", ""), "the place of a row's length"),
    _narrow(
        "F333", PRIMITIVES, _NEW_LENGTH, _NEW_LENGTH.replace(".to(tl.int64)", ""), "the place of a row's new length"
    ),
)
