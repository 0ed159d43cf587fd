"""What the device checks because the host may not look: calls that a CUDA graph records."""

from __future__ import annotations

from properties.mutants.mutant import APPEND, CACHE, PREFILL, PRIMITIVES, SPLIT_KV, Edit, Mutant

UNSEEN = ("host_cannot_see",)

_STORES = "stores = takes_new & (tile == 0) & ((flags & APPEND) != 0) & fits"
_LENGTH = "tl.store(seq_lens_out_ptr + b, tl.where(fits, cached + num_queries, cached))"
_APPENDED = "tl.store(seq_lens_out_ptr + b, tl.where(fits, cached + num_tokens, cached))"
_OVERFLOW = "            tl.store(fault_ptr, b + 1)\n"
_BAD_LENGTH = "        tl.store(fault_ptr + 1, b + 1)\n"


def _unseen(id_: str, category: str, change: str, where: str, file: str, anchor: str, replacement: str) -> Mutant:
    return Mutant(id_, category, change, where, (Edit(file, anchor, replacement),), UNSEEN)


MUTANTS = (
    _unseen(
        "F94",
        "STATE",
        "a row that did not fit is not reported",
        "a recorded call that overflows",
        PRIMITIVES,
        _OVERFLOW,
        _OVERFLOW.replace("b + 1", "0"),
    ),
    _unseen(
        "F372",
        "APPEND",
        "a token that does not fit is stored",
        "split path, a recorded call that overflows",
        SPLIT_KV,
        _STORES,
        _STORES.removesuffix(" & fits"),
    ),
    _unseen(
        "F440",
        "STATE",
        "a length out of range is not reported",
        "a recorded call with a length beyond the capacity or below 0",
        PRIMITIVES,
        _BAD_LENGTH,
        _BAD_LENGTH.replace("b + 1", "0"),
    ),
    _unseen(
        "F441",
        "STATE",
        "the row before the one that did not fit is reported",
        "a recorded call that overflows",
        PRIMITIVES,
        _OVERFLOW,
        _OVERFLOW.replace("b + 1", "tl.maximum(b, 1)"),
    ),
    _unseen(
        "F442",
        "APPEND",
        "tokens that do not fit are stored",
        "prefill path, a recorded call that overflows",
        PREFILL,
        "        if fits:\n            first_token",
        "        if lengths_ok:\n            first_token",
    ),
    _unseen(
        "F443",
        "APPEND",
        "tokens that do not fit are stored",
        "buffers read through a copy, a recorded call that overflows",
        APPEND,
        "    if fits:\n        b64",
        "    if lengths_ok:\n        b64",
    ),
    _unseen(
        "F444",
        "STATE",
        "a row that does not fit counts its tokens all the same",
        "split path, a recorded call that overflows",
        SPLIT_KV,
        _LENGTH,
        _LENGTH.replace("fits,", "lengths_ok,"),
    ),
    _unseen(
        "F445",
        "STATE",
        "a row that does not fit counts its tokens all the same",
        "prefill path, a recorded call that overflows",
        PREFILL,
        _LENGTH,
        _LENGTH.replace("fits,", "lengths_ok,"),
    ),
    _unseen(
        "F446",
        "STATE",
        "a row that does not fit counts its tokens all the same",
        "buffers read through a copy, a recorded call that overflows",
        APPEND,
        _APPENDED,
        _APPENDED.replace("fits,", "lengths_ok,"),
    ),
    _unseen(
        "F447",
        "APPEND",
        "a row whose length was brought into range is taken for one that fits",
        "split path, a recorded call with a length beyond the capacity or below 0",
        SPLIT_KV,
        "fits = lengths_ok & (cached + num_queries <= slot_limit)",
        "fits = cached + num_queries <= slot_limit",
    ),
    _unseen(
        "F448",
        "APPEND",
        "a row whose length was brought into range is taken for one that fits",
        "prefill path, a recorded call with a length beyond the capacity or below 0",
        PREFILL,
        "fits = lengths_ok & (cached + num_queries <= slot_limit)",
        "fits = cached + num_queries <= slot_limit",
    ),
    _unseen(
        "F449",
        "STATE",
        "a length out of range is not reported where nothing is stored",
        "split path, a recorded call with update_cache=False",
        SPLIT_KV,
        "elif flags & (HAS_SEQ_LENS | HAS_NEW_LENS):",
        "elif flags & (HAS_SEQ_LENS & HAS_NEW_LENS):",
    ),
    _unseen(
        "F450",
        "STATE",
        "a length out of range is not reported where nothing is stored",
        "prefill path, a recorded call with update_cache=False",
        PREFILL,
        "elif flags & (HAS_SEQ_LENS | HAS_NEW_LENS):",
        "elif flags & (HAS_SEQ_LENS & HAS_NEW_LENS):",
    ),
    _unseen(
        "F451",
        "STATE",
        "a bad length is reported for ever",
        "a recorded call with a length beyond the capacity or below 0",
        CACHE,
        "        if bad_length:\n            self.fault.zero_()\n",
        "        if bad_length:\n",
    ),
)
