"""Repeated launches: what must be part of the key, what must be looked at every time, what may not be kept."""

from __future__ import annotations

from properties.mutants.mutant import CACHE, RELAUNCH, TUNING, WRAPPER, Edit, Mutant

OTHERS = ("other_options",)
REFUSED = ("whatever_was_called_before",)
STEPS = ("steady_stream", "within_the_error_budget", "append_stores")

_OPTIONS = "(cache_max_len, block_m, block_n, scale, is_causal, num_query_heads, num_kv_heads, return_lse)"


def _without_option(id_: str, name: str, laws: tuple[str, ...]) -> Mutant:
    """``name`` does not tell one call from another."""
    kept = [option for option in _OPTIONS.strip("()").split(", ") if option != name]
    return Mutant(
        id_,
        "STATE",
        f"calls that differ in {name} alone count as the same call",
        "one KVCache, two calls",
        (Edit(WRAPPER, f"options = {_OPTIONS}", f"options = ({', '.join(kept)})"),),
        laws,
    )


def _blind_to(id_: str, what: str, tensor: str, seen: str, laws: tuple[str, ...]) -> Mutant:
    """A property of a tensor does not tell one call from another: ``seen`` is compared instead of it."""
    change = f"calls that differ in {what} alone count as the same call"
    instead = "(" + ", ".join(seen if name == tensor else name for name in ("query", "key", "value"))
    edits = (
        Edit(CACHE, "are_alike(query, key, value", "are_alike" + instead),
        Edit(RELAUNCH, "likeness(query, key, value", "likeness" + instead),
    )
    return Mutant(id_, "STATE", change, "one KVCache, two calls", edits, laws)


def _without(id_: str, what: str, anchor: str, kept: str, laws: tuple[str, ...]) -> Mutant:
    """Something besides does not tell one call from another."""
    change = f"calls that differ in {what} alone count as the same call"
    return Mutant(id_, "STATE", change, "one KVCache, two calls", (Edit(RELAUNCH, anchor, kept),), laws)


MUTANTS = (
    _without_option("F200", "scale", OTHERS),
    _without_option("F201", "is_causal", OTHERS),
    _without_option("F202", "return_lse", OTHERS),
    _without_option("F203", "block_n", OTHERS),
    _without_option("F204", "cache_max_len", REFUSED),
    _without_option("F205", "num_kv_heads", REFUSED),
    _blind_to("F206", "the strides of the key", "key", "key.contiguous()", OTHERS),
    _blind_to("F207", "the strides of the value", "value", "value.contiguous()", OTHERS),
    _blind_to("F208", "the dtype of the query", "query", "query.to(key.dtype)", REFUSED),
    _blind_to("F209", "the shape of the value", "value", "key", REFUSED),
    _without("F210", "the types of options", "tuple(map(type, options)), options", "(), options", REFUSED),
    _without("F211", "a forced plan", ", options, tuning.generation()", ", options", ("another_kernel",)),
    _blind_to("F212", "whether the query requires grad", "query", "query.detach()", REFUSED),
    Mutant(
        "F213",
        "STATE",
        "repeated launches write their lengths to one place",
        "a fork from a KVCache of a repeated call",
        (Edit(CACHE, "next(rows.addresses, 0) if", "rows.first if"),),
        STEPS,
    ),
    Mutant(
        "F214",
        "STATE",
        "repeated launches write their outputs to one place",
        "a KVCache's third decode step",
        (
            Edit(
                RELAUNCH,
                "out = buffers.empty(self.out_shape, self.dtype, self.device)",
                'out = self.__dict__.setdefault("kept", buffers.empty(self.out_shape, self.dtype, self.device))',
            ),
        ),
        STEPS,
    ),
    Mutant(
        "F215",
        "STATE",
        "a repeated launch's scratch has room for the splits of the first only",
        "decode steps across a split's edge",
        (
            Edit(
                RELAUNCH,
                "plan.grid_splits(slot_limit), query",
                "max(2, plan.grid_splits(cache.max_len or 0)), query",
            ),
        ),
        STEPS,
    ),
    Mutant(
        "F216",
        "STATE",
        "a repeated launch counts a chunk as one token",
        "repeated chunks of several tokens",
        (Edit(RELAUNCH, "past.repeated(rows, after, bound + self.q_len,", "past.repeated(rows, after, bound + 1,"),),
        STEPS,
    ),
    Mutant(
        "F365",
        "STATE",
        "a repeated launch has the splits of the longest row, though whole tiles may leave a shorter one more",
        "decode steps of a ragged batch, splits that must grow, the longest row just past a multiple",
        (Edit(RELAUNCH, "self.plan.grid_splits(bound)", "self.plan.num_splits(bound)"),),
        ("rows_of_fewer_splits", *STEPS),
    ),
    Mutant(
        "F217",
        "STATE",
        "a call whose tensors are read through copies is repeated with the copies of the first",
        "a KVCache of odd head_dim, second decode step",
        (Edit(WRAPPER, "readable = dataclasses.replace(readable, call=None)", "pass"),),
        STEPS,
    ),
    Mutant(
        "F218",
        "STATE",
        "the limit of a repeated launch is the larger of capacity and cache_max_len",
        "decode steps past the capacity",
        (Edit(WRAPPER, "slot_limit=min(capacity, cache_max_len)", "slot_limit=max(capacity, cache_max_len)"),),
        ("fits_to_its_last_slot", "growth_at_least", *STEPS),
    ),
    Mutant(
        "F219",
        "STATE",
        "the key of a launch is forgotten when a forced plan ends",
        "calls under a forced plan, then without",
        (
            Edit(
                TUNING,
                "    finally:\n        _forced = before\n        _generation += 1\n",
                "    finally:\n        _forced = before\n        _generation -= 1\n",
            ),
        ),
        ("another_kernel",),
    ),
    Mutant(
        "F220",
        "STATE",
        "arrival counters are as many as the first call needed",
        "one KVCache, calls of more row tiles",
        (
            Edit(
                CACHE,
                "if lineage.arrivals is None or lineage.arrivals.numel() < count:",
                "if lineage.arrivals is None:",
            ),
        ),
        ("ragged_stream", *STEPS),
    ),
    Mutant(
        "F221",
        "STATE",
        "the bound after a ragged step is that of its shortest new tokens",
        "new_lens of several lengths, then a decode step",
        (
            Edit(
                WRAPPER,
                "self.q_len if self.new is None else max(self.new, default=0))",
                "self.q_len if self.new is None else min(self.new, default=0))",
            ),
        ),
        ("ragged_stream", *STEPS),
    ),
    Mutant(
        "F222",
        "STATE",
        "an empty step forgets the lengths",
        "q_len == 0 on a cache",
        (
            Edit(
                WRAPPER,
                ") if problem.seq_lens is not None else problem.seq_lens_out.zero_()",
                ") if problem.seq_lens is None else problem.seq_lens_out.zero_()",
            ),
        ),
        STEPS,
    ),
)
