"""What must not be read, and NaN that must stay with those who see it."""

from __future__ import annotations

from properties.mutants.mutant import PRIMITIVES, SPLIT_KV, Edit, Mutant

POISON = ("invisible", "within_the_error_budget")
NON_FINITE = ("a_non_finite",)

_CONTAIN = "        acc, v = contain_nonfinite_values(acc, v, start_n + offs_n, row_limit)\n"
_ANY = "if tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) == 0:"
_CONTAIN_NEW = "    acc, v = contain_nonfinite_values(acc, v, offs_n, row_limit)\n"

MUTANTS = (
    Mutant(
        "F120",
        "POISON",
        "a NaN value on the diagonal of a long chunk spreads to queries that do not see it",
        "prefill, causal, a non-finite value",
        (Edit(PRIMITIVES, _CONTAIN, ""),),
        NON_FINITE,
    ),
    Mutant(
        "F121",
        "POISON",
        "a NaN value on the diagonal of a short chunk spreads to queries that do not see it",
        "split path, causal, a non-finite value",
        (Edit(PRIMITIVES, _CONTAIN_NEW, ""),),
        NON_FINITE,
    ),
    Mutant(
        "F122",
        "POISON",
        "a NaN value reaches the query before the first that sees it",
        "causal, a non-finite value",
        (
            Edit(
                PRIMITIVES,
                "row_limit[:, None] > first_nonfinite[None, :]",
                "row_limit[:, None] >= first_nonfinite[None, :]",
            ),
        ),
        NON_FINITE,
    ),
    Mutant(
        "F123",
        "POISON",
        "an infinite value is taken for a finite one",
        "causal, an infinite value",
        (
            Edit(
                PRIMITIVES,
                'finite = tl.abs(v.to(tl.float32)) < float("inf")',
                'finite = tl.abs(v.to(tl.float32)) <= float("inf")',
            ),
        ),
        NON_FINITE,
    ),
    Mutant(
        "F124",
        "POISON",
        "a non-finite value is replaced by 0 for everybody",
        "causal, a non-finite value",
        (
            Edit(
                PRIMITIVES,
                '        acc = tl.where(row_limit[:, None] > first_nonfinite[None, :], float("nan"), acc)\n',
                "",
            ),
        ),
        NON_FINITE,
    ),
    Mutant(
        "F384",
        "POISON",
        "only the first key of a tile is looked at for a non-finite value",
        "causal, a non-finite value",
        (
            Edit(
                PRIMITIVES,
                _ANY,
                _ANY.replace(
                    "finite.to(tl.int32)",
                    "tl.where(offs_n[:, None] == tl.min(offs_n, axis=0), finite.to(tl.int32), 1)",
                ),
            ),
        ),
        NON_FINITE,
    ),
    Mutant(
        "F385",
        "POISON",
        "values are contained only where all are finite",
        "causal, a non-finite value",
        (Edit(PRIMITIVES, _ANY, _ANY.replace("== 0", "!= 0")),),
        NON_FINITE,
    ),
    Mutant(
        "F125",
        "POISON",
        "padding tokens' values are loaded; their weight is 0, but 0 * NaN is NaN",
        "split path, new_lens < q_len",
        (
            Edit(
                SPLIT_KV,
                "        v_new = load_tile(v_new_ptr, new_n, offs_d, stride_vnn, new_keys, head_dim",
                "        v_new = load_tile(v_new_ptr, new_n, offs_d, stride_vnn, q_len, head_dim",
            ),
        ),
        POISON,
    ),
)
