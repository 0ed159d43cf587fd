"""Arguments that are ignored, or taken for what they are not."""

from __future__ import annotations

from properties.mutants.mutant import PREFILL, WRAPPER, Edit, Mutant

VALUES = ("within_the_error_budget",)

_SCALE = """\
        qk_scale=qk_scale,
        causal_offset=0 if is_causal"""
_CAUSAL_FLAG = """\
    validation.check_flag("is_causal", is_causal)
    validation.check_flag("return_lse", return_lse)
"""

MUTANTS = (
    Mutant(
        "W3",
        "VALID",
        "without seq_lens a plain pair of buffers counts as full",
        "a plain tuple without seq_lens",
        (
            Edit(
                WRAPPER,
                "    if not isinstance(past, KVCache) and seq_lens is None:\n",
                "    if not isinstance(past, KVCache) and seq_lens is None:\n"
                "        lens = torch.full((batch,), past[0].shape[2], dtype=torch.int32, device=query.device)\n"
                "        return KVCache(past[0], past[1], lens)\n"
                "    if not isinstance(past, KVCache) and seq_lens is None:\n",
            ),
        ),
        ("without_their_lengths",),
    ),
    Mutant(
        "F130",
        "VALID",
        "the scale is ignored",
        "an explicit scale",
        (
            Edit(
                WRAPPER,
                _SCALE,
                _SCALE.replace("=qk_scale", "=validation.check_scale(None, head_dim)"),
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F131",
        "VALID",
        "new_lens are ignored by long chunks",
        "prefill, new_lens < q_len",
        (
            Edit(
                PREFILL,
                "num_new_keys, flags\n    )\n    query,",
                "num_new_keys, flags & HAS_SEQ_LENS\n    )\n    query,",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F132",
        "VALID",
        "is_causal is ignored by attention without a cache",
        "attention, causal",
        (
            Edit(
                WRAPPER,
                _CAUSAL_FLAG,
                "    is_causal = False\n" + _CAUSAL_FLAG,
            ),
        ),
        ("without_a_cache",),
    ),
    Mutant(
        "F133",
        "VALID",
        "update_cache=False does not see the new tokens",
        "a peek on a given cache",
        (Edit(WRAPPER, "        num_new_keys=q_len,\n", "        num_new_keys=q_len if update_cache else 0,\n"),),
        VALUES,
    ),
    Mutant(
        "F134",
        "VALID",
        "seq_lens are taken to count the new tokens",
        "seq_lens given",
        (
            Edit(
                WRAPPER,
                "        seq_lens=None if past is None else lengths.seq_lens,\n",
                "        seq_lens=None\n"
                "        if past is None or lengths.seq_lens is None\n"
                "        else (lengths.seq_lens - (seq_lens is not None)).clamp(0),\n",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F386",
        "VALID",
        "kernels are told of lengths for an append, and of an append for lengths",
        "new_lens without an append, an append without new_lens",
        (
            Edit(WRAPPER, "        HAS_NEW_LENS: lens[1] is not None,", "        APPEND: lens[1] is not None,"),
            Edit(WRAPPER, "        APPEND: append,", "        HAS_NEW_LENS: append,"),
        ),
        ("append_stores", *VALUES),
    ),
    Mutant(
        "F387",
        "VALID",
        "kernels are told of new_lens for seq_lens, and of seq_lens for new_lens",
        "one of them given",
        (
            Edit(WRAPPER, "        HAS_SEQ_LENS: lens[0] is not None,", "        HAS_NEW_LENS: lens[0] is not None,"),
            Edit(WRAPPER, "        HAS_NEW_LENS: lens[1] is not None,", "        HAS_SEQ_LENS: lens[1] is not None,"),
        ),
        VALUES,
    ),
    Mutant(
        "F388",
        "VALID",
        "kernels are not told that an LSE is asked for",
        "return_lse",
        (Edit(WRAPPER, "        RETURN_LSE: return_lse,\n", ""),),
        VALUES,
    ),
)
