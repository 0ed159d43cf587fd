"""What one call leaves behind for the next: lengths, bounds, counters, repeated launches."""

from __future__ import annotations

from properties.mutants.mutant import CACHE, PRIMITIVES, RELAUNCH, SPLIT_KV, WRAPPER, Edit, Mutant

VALUES = ("within_the_error_budget",)
BYTES = ("append_stores", "within_the_error_budget")
REPEATED = ("steady_stream", "within_the_error_budget")
INPUTS = ("nothing_else_is_written",)

_RESULT = "    cache = owner if update_cache else None\n"

MUTANTS = (
    Mutant(
        "W5",
        "STATE",
        "the seq_lens that the caller passed are counted up in place",
        "seq_lens given",
        (
            Edit(
                WRAPPER,
                _RESULT,
                "    if owner is not None and update_cache and seq_lens is not None:\n"
                "        seq_lens.copy_(owner.seq_lens)\n" + _RESULT,
            ),
        ),
        INPUTS,
    ),
    Mutant(
        "W6",
        "STATE",
        "the length of row 0 is used for every row",
        "ragged batch",
        (
            Edit(
                PRIMITIVES,
                "load_length(seq_lens_ptr, b.to(tl.int64) * stride_seq,",
                "load_length(seq_lens_ptr, 0 * b,",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F80",
        "STATE",
        "arrival counters are not reset",
        "splits > 1, a second step on the same cache",
        (Edit(SPLIT_KV, "            tl.store(arrival_ptr, 0)\n", ""),),
        ("decode_over_several_splits", *VALUES),
    ),
    Mutant(
        "F81",
        "STATE",
        "the bound of the longest row does not grow with a step",
        "a KVCache's second step",
        (
            Edit(
                WRAPPER,
                "return self.bound + (self.q_len if self.new is None else max(self.new, default=0))",
                "return self.bound",
            ),
        ),
        BYTES,
    ),
    Mutant(
        "F82",
        "STATE",
        "a roll-back of a KVCache is ignored: its own lengths win",
        "seq_lens beside a KVCache",
        (
            Edit(
                WRAPPER,
                "self.seq_lens = seq_lens if seq_lens is not None else own",
                "self.seq_lens = own if own is not None else seq_lens",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F83",
        "STATE",
        "the KVCache passed in is counted up instead of a new one returned",
        "a fork",
        (
            Edit(
                WRAPPER,
                _RESULT,
                "    if isinstance(past, KVCache) and owner is not None and update_cache:\n"
                "        past.seq_lens = owner.seq_lens\n" + _RESULT,
            ),
        ),
        INPUTS,
    ),
    Mutant(
        "F84",
        "STATE",
        "a repeated launch keeps the first one's bound of the lengths",
        "a KVCache's third decode step",
        (Edit(RELAUNCH, '"max_cached"', '"stride_new"'),),
        REPEATED,
    ),
    Mutant(
        "F85",
        "STATE",
        "a repeated launch's cache keeps the bound it had before",
        "a KVCache's third decode step",
        (Edit(RELAUNCH, "past.repeated(rows, after, bound + self.q_len,", "past.repeated(rows, after, bound,"),),
        REPEATED,
    ),
    Mutant(
        "F86",
        "STATE",
        "a repeated launch keeps the first one's number of splits",
        "decode steps across a split's edge",
        (Edit(RELAUNCH, '"grid_splits"', '"stride_new"'),),
        REPEATED,
    ),
    Mutant(
        "F87",
        "STATE",
        "a repeated launch does not check capacity",
        "decode steps up to cache_max_len",
        (Edit(RELAUNCH, "bound is None or bound + self.q_len > self.slot_limit or past", "bound is None or past"),),
        ("fits_to_its_last_slot", "overflow_is_all_or_nothing"),
    ),
    Mutant(
        "F88",
        "STATE",
        "a repeated launch stops one token before the limit",
        "decode steps up to cache_max_len",
        (Edit(RELAUNCH, "bound + self.q_len > self.slot_limit", "bound + self.q_len > self.slot_limit + 1"),),
        ("fits_to_its_last_slot", "overflow_is_all_or_nothing"),
    ),
    Mutant(
        "F89",
        "STATE",
        "a repeated launch reads the lengths of the first",
        "a KVCache's third decode step",
        (Edit(RELAUNCH, '"seq_lens_ptr"', '"new_lens_ptr"'),),
        REPEATED,
    ),
    Mutant(
        "F90",
        "STATE",
        "a repeated launch adds the values of the first",
        "a KVCache's third decode step",
        (Edit(RELAUNCH, '"v_new_ptr"', '"new_lens_ptr"'),),
        REPEATED,
    ),
    Mutant(
        "F91",
        "STATE",
        "calls that differ in their options alone count as the same call",
        "one KVCache, two scales",
        (
            Edit(
                WRAPPER,
                "past_key_value.repeat(query, key, value, options)",
                "past_key_value.repeat(query, key, value, (return_lse,))",
            ),
            Edit(
                WRAPPER,
                "relaunch.Call(query, key, value, lengths.seq_lens, options)",
                "relaunch.Call(query, key, value, lengths.seq_lens, (return_lse,))",
            ),
        ),
        ("other_options",),
    ),
    Mutant(
        "F92",
        "STATE",
        "calls that differ in the strides of the query alone count as the same call",
        "one KVCache, two layouts",
        (
            Edit(CACHE, "are_alike(query, key, ", "are_alike(query.contiguous(), key, "),
            Edit(RELAUNCH, "likeness(query, key, ", "likeness(query.contiguous(), key, "),
        ),
        ("other_options",),
    ),
    Mutant(
        "F93",
        "STATE",
        "a cache that has grown keeps the counters, the launches and the scratch of the old one",
        "growth",
        (
            Edit(CACHE, "if like is not None and like[0] is k_cache and like[1] is v_cache:", "if like is not None:"),
            Edit(
                RELAUNCH,
                "% 16 or self.cache_pointers != (\n            k_cache.data_ptr(), v_cache.data_ptr(),\n        ):",
                "% 16:",
            ),
        ),
        ("call_that_grows_the_buffers", *BYTES),
    ),
)
