"""Where new tokens go, and whether there is room for them."""

from __future__ import annotations

from properties.mutants.mutant import APPEND, PREFILL, PRIMITIVES, SPLIT_KV, WRAPPER, Edit, Mutant

VALUES = ("within_the_error_budget",)
BYTES = ("append_stores", "nothing_else_is_written")
OVERFLOW = ("fits_to_its_last_slot", "overflow_is_all_or_nothing")

_SLOT = "slot = (first_slot + offs_n).to(tl.int64)[:, None]\n"
_STORED_SLOT = _SLOT + "    tl.store(k_cache_ptr + slot * stride_kcn + offs_d, k, mask=mask)\n"
_COPIED_SLOT = _SLOT + "        k = tl.load("
_CHECK = "            validation.check_capacity(cached, new, cache_max_len)\n"
_GROWS = "if past is not None and needed > lengths.capacity:"
_GROWS_IF_IT_MAY = "if past is not None and needed > lengths.capacity and cache_max_len > lengths.capacity:"
_FITS = "fits = lengths_ok & (cached + num_queries <= slot_limit)"
_LENGTH = "tl.store(seq_lens_out_ptr + b, tl.where(fits, cached + num_queries, cached))"
_STORED_V = "tl.store(v_cache_ptr + slot * stride_vcn + offs_d, v, mask=mask)"

MUTANTS = (
    Mutant(
        "M57",
        "APPEND",
        "new tokens are stored one slot too far",
        "any append",
        (
            Edit(PRIMITIVES, _STORED_SLOT, _STORED_SLOT.replace("+ offs_n)", "+ offs_n + 1)")),
            Edit(PRIMITIVES, _COPIED_SLOT, _COPIED_SLOT.replace("+ offs_n)", "+ offs_n + 1)")),
        ),
        BYTES,
    ),
    Mutant(
        "M58",
        "APPEND",
        "capacity is not checked: the write lands in the next head or row",
        "over capacity",
        (
            Edit(WRAPPER, _CHECK, ""),
            Edit(WRAPPER, _GROWS, _GROWS_IF_IT_MAY),
            Edit(
                WRAPPER,
                "slot_limit=min(capacity, cache_max_len)",
                "slot_limit=2 * max(capacity, cache_max_len) + 128",
            ),
        ),
        OVERFLOW,
    ),
    Mutant(
        "M61",
        "APPEND",
        "new tokens of every row go after the longest row's",
        "ragged batch",
        (
            Edit(
                SPLIT_KV,
                "k_cache_ptr, v_cache_ptr, cached, k_new, v_new",
                "k_cache_ptr, v_cache_ptr, max_cached, k_new, v_new",
            ),
            Edit(PREFILL, "k_new_ptr, v_new_ptr, cached, first_token", "k_new_ptr, v_new_ptr, max_cached, first_token"),
        ),
        BYTES,
    ),
    Mutant(
        "W1",
        "APPEND",
        "an overflow is dropped without a word, and the length stays",
        "over capacity",
        (
            Edit(WRAPPER, _CHECK, ""),
            Edit(WRAPPER, _GROWS, _GROWS_IF_IT_MAY),
            Edit(PRIMITIVES, "        if fits == 0:\n", "        if b < 0:\n"),
        ),
        OVERFLOW,
    ),
    Mutant(
        "W2",
        "APPEND",
        "when a row overflows, the rows before it are already written",
        "ragged batch, a later row over capacity",
        (
            Edit(
                WRAPPER,
                _CHECK,
                "            for b, (start, count) in enumerate(zip(cached, new, strict=True)):\n"
                "                if start + count > cache_max_len or past is None:\n"
                "                    break\n"
                "                if any(n + c > cache_max_len for n, c in zip(cached, new, strict=True)):\n"
                "                    past[0][b, :, start : start + count] = key[b, :, :count]\n" + _CHECK,
            ),
        ),
        OVERFLOW,
    ),
    Mutant(
        "W4",
        "APPEND",
        "update_cache=False writes all the same",
        "a KVCache with room",
        (
            Edit(
                WRAPPER,
                "        seq_lens_out = None\n",
                "        seq_lens_out = (\n"
                "            buffers.empty([batch], torch.int32, query.device) if isinstance(past, KVCache) else None\n"
                "        )\n",
            ),
        ),
        ("nothing_else_is_written",),
    ),
    Mutant(
        "F60",
        "APPEND",
        "values are stored with the stride of the keys",
        "key and value buffers of different strides",
        (Edit(PRIMITIVES, _STORED_V, _STORED_V.replace("stride_vcn", "stride_kcn")),),
        BYTES,
    ),
    Mutant(
        "F61",
        "APPEND",
        "padding columns are stored over the next slot",
        "split path, head_dim not a power of two",
        (
            Edit(
                PRIMITIVES,
                "mask = (offs_n < stop)[:, None] & (offs_d < head_dim)\n",
                "mask = (offs_n < stop)[:, None] & (offs_d < BLOCK_D)\n",
            ),
        ),
        BYTES,
    ),
    Mutant(
        "F62",
        "APPEND",
        "padding tokens are stored, too",
        "split path, new_lens < q_len",
        (Edit(SPLIT_KV, "k_new, v_new, num_queries, head_dim,\n", "k_new, v_new, q_len, head_dim,\n"),),
        BYTES,
    ),
    Mutant(
        "F63",
        "APPEND",
        "the returned length counts padding tokens",
        "prefill, new_lens < q_len",
        (Edit(PREFILL, _LENGTH, _LENGTH.replace("num_queries", "q_len")),),
        BYTES,
    ),
    Mutant(
        "F64",
        "APPEND",
        "the returned length of an empty row is 1",
        "split path, seq_lens[b] + new_lens[b] == 0",
        (Edit(SPLIT_KV, _LENGTH, _LENGTH.replace("cached + num_queries,", "tl.maximum(cached + num_queries, 1),")),),
        ("sees_no_key", *BYTES),
    ),
    Mutant(
        "F65",
        "APPEND",
        "a row that fills its last slot counts as full already",
        "split path, cached + new == capacity",
        (Edit(SPLIT_KV, _FITS, _FITS.replace("<=", "<")),),
        BYTES,
    ),
    Mutant(
        "F66",
        "APPEND",
        "the separate append counts a row that fills its last slot as full",
        "unaligned cache, cached + new == capacity",
        (
            Edit(
                APPEND,
                "fits = lengths_ok & (cached + num_tokens <= slot_limit)",
                "fits = lengths_ok & (cached + num_tokens < slot_limit)",
            ),
        ),
        BYTES,
    ),
    Mutant(
        "F67",
        "APPEND",
        "the separate append copies only the first tile of new tokens",
        "unaligned cache, more than 16 new tokens",
        (Edit(WRAPPER, "token_tiles = tuning.ceil_div(q_len, block_n)", "token_tiles = 1"),),
        BYTES,
    ),
    Mutant(
        "F68",
        "APPEND",
        "the separate append reads new values with the head stride of the keys",
        "unaligned cache, new keys and values of different strides",
        (
            Edit(
                APPEND,
                "v_new_ptr + b64 * stride_vnb + h64 * stride_vnh",
                "v_new_ptr + b64 * stride_vnb + h64 * stride_knh",
            ),
        ),
        BYTES,
    ),
    Mutant(
        "F69",
        "APPEND",
        "a call that needs one slot more than the limit is let through",
        "cached + new == cache_max_len + 1",
        (Edit(WRAPPER, "        if needed > limit:\n", "        if needed > limit + 1:\n"),),
        OVERFLOW,
    ),
    Mutant(
        "F70",
        "APPEND",
        "a cache that would be exactly full is refused",
        "cached + new == cache_max_len",
        (
            Edit(WRAPPER, "        if needed > limit:\n", "        if needed >= limit:\n"),
            Edit(
                "flashcore/validation.py",
                "        if cached + new > cache_max_len:\n",
                "        if cached + new >= cache_max_len:\n",
            ),
        ),
        OVERFLOW,
    ),
    Mutant(
        "F71",
        "APPEND",
        "growth leaves the last slot behind",
        "a full buffer grows",
        (Edit(WRAPPER, "new[:, :, :slots].copy_(old)", "new[:, :, : slots - 1].copy_(old[:, :, : slots - 1])"),),
        ("growth", *BYTES),
    ),
    Mutant(
        "F72",
        "APPEND",
        "growth passes cache_max_len",
        "a buffer of more than half cache_max_len grows",
        (
            Edit(
                WRAPPER,
                "_grow(past, min(cache_max_len, max(needed, 2 * lengths.capacity)))",
                "_grow(past, max(needed, 2 * lengths.capacity))",
            ),
        ),
        ("growth", *BYTES),
    ),
    Mutant(
        "F73",
        "APPEND",
        "growth only doubles, however much is needed",
        "more than twice the capacity is needed",
        (
            Edit(
                WRAPPER,
                "_grow(past, min(cache_max_len, max(needed, 2 * lengths.capacity)))",
                "_grow(past, min(cache_max_len, 2 * lengths.capacity))",
            ),
        ),
        ("growth", *BYTES),
    ),
    Mutant(
        "F74",
        "APPEND",
        "the buffers grow although new_lens leave room",
        "q_len of padding beyond the capacity",
        (
            Edit(
                WRAPPER,
                "            needed = lengths.bound_after() or 0\n",
                "            needed = max(cached, default=0) + lengths.q_len\n",
            ),
        ),
        ("nothing_else_is_written", *BYTES),
    ),
    Mutant(
        "F75",
        "APPEND",
        "only row 0 is checked for capacity",
        "a later row over capacity",
        (
            Edit(WRAPPER, _CHECK, _CHECK.replace("cached, new,", "cached[:1], new[:1],")),
            Edit(WRAPPER, _GROWS, _GROWS_IF_IT_MAY),
        ),
        OVERFLOW,
    ),
)
