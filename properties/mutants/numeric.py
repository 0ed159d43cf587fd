"""Ranges and roundings."""

from __future__ import annotations

from properties.mutants.mutant import PREFILL, PRIMITIVES, VALIDATION, Edit, Mutant

VALUES = ("within_the_error_budget",)

_LOGITS = 'logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale  # [BLOCK_M, BLOCK_N]\n'
_NEW_LOGITS = 'logits = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale  # [BLOCK_M, BLOCK_NEW]\n'
FOLD = 'acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")'
_NO_MAXIMUM = 'tl.full([BLOCK_M], -float("inf"), tl.float32)'


def both_logits(product: str) -> tuple[Edit, ...]:
    """The same change of the logits of cached and of new keys."""
    return tuple(
        Edit(PRIMITIVES, anchor, anchor.replace('tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale', product))
        for anchor in (_LOGITS, _NEW_LOGITS)
    )


MUTANTS = (
    Mutant(
        "M44",
        "NUMERIC",
        "no running maximum",
        "logits beyond 88",
        (
            Edit(
                PRIMITIVES,
                "m_new = tl.maximum(m_i, tl.max(logits, axis=1))",
                'm_new = tl.maximum(m_i, tl.where(tl.max(logits, axis=1) == -float("inf"), -float("inf"), 0.0))',
            ),
        ),
        VALUES,
    ),
    Mutant(
        "M45",
        "NUMERIC",
        "scores are rounded to float16 before they are scaled",
        "abs(q.k) > 65504",
        both_logits('tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float16).to(tl.float32) * qk_scale'),
        VALUES,
    ),
    Mutant(
        "M48",
        "NUMERIC",
        "the accumulator is rounded to the input dtype after every tile",
        "several tiles, float16 or bfloat16",
        (Edit(PRIMITIVES, FOLD, FOLD + ".to(v.dtype).to(tl.float32)"),),
        VALUES,
    ),
    Mutant(
        "M49",
        "NUMERIC",
        "the accumulator is not rescaled when the maximum rises",
        "several tiles, a later one larger",
        (Edit(PRIMITIVES, FOLD, FOLD.replace("acc * alpha[:, None]", "acc")),),
        VALUES,
    ),
    Mutant(
        "F50",
        "NUMERIC",
        "the sum of weights is not rescaled when the maximum rises",
        "several tiles, a later one larger",
        (Edit(PRIMITIVES, "l_i = l_i * alpha + tl.sum(p, axis=1)", "l_i = l_i + tl.sum(p, axis=1)"),),
        VALUES,
    ),
    Mutant(
        "F51",
        "NUMERIC",
        "the LSE is in base 2",
        "every call that returns it",
        (Edit(PRIMITIVES, "(m_i + tl.log2(l_i)) * ln_2", "(m_i + tl.log2(l_i))"),),
        VALUES,
    ),
    Mutant(
        "F52",
        "NUMERIC",
        "the query is scaled in its own format before the product",
        "float16, bfloat16",
        tuple(
            Edit(
                PRIMITIVES,
                anchor,
                anchor.replace("tl.dot(q,", "tl.dot((q * qk_scale).to(q.dtype),").replace(" * qk_scale  #", "  #"),
            )
            for anchor in (_LOGITS, _NEW_LOGITS)
        ),
        VALUES,
    ),
    Mutant(
        "F53",
        "NUMERIC",
        "a negative scale counts as positive",
        "scale < 0",
        (
            Edit(
                VALIDATION,
                "float(np.float32(np.float32(scale) * np.float32(LOG2_E)))",
                "float(np.float32(np.float32(abs(scale)) * np.float32(LOG2_E)))",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F54",
        "NUMERIC",
        "a scale of 0 means the default",
        "scale == 0",
        (Edit(VALIDATION, "    if scale is None:\n", "    if not scale and not isinstance(scale, bool):\n"),),
        VALUES,
    ),
    Mutant(
        "F55",
        "NUMERIC",
        "weights are rounded to bfloat16 whatever the input's format",
        "float16, float32",
        (Edit(PRIMITIVES, "acc = tl.dot(p.to(v.dtype), v,", "acc = tl.dot(p.to(tl.bfloat16).to(v.dtype), v,"),),
        VALUES,
    ),
    Mutant(
        "F56",
        "NUMERIC",
        "the maximum starts at 0 instead of -inf",
        "negative logits",
        (
            Edit(PRIMITIVES, _NO_MAXIMUM, "tl.zeros([BLOCK_M], tl.float32)"),
            Edit(PREFILL, _NO_MAXIMUM, "tl.zeros([BLOCK_M], tl.float32)"),
        ),
        VALUES,
    ),
    Mutant(
        "F57",
        "NUMERIC",
        "the default scale is computed from the padded head_dim",
        "head_dim not a power of two, default scale",
        (
            Edit(
                VALIDATION,
                "        scale = head_dim**-0.5\n",
                "        scale = (1 << (head_dim - 1).bit_length()) ** -0.5\n",
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F58",
        "NUMERIC",
        "float32 products are rounded to TF32",
        "float32",
        tuple(Edit(PRIMITIVES, anchor, anchor.replace('"ieee"', '"tf32"')) for anchor in (_LOGITS, _NEW_LOGITS)),
        VALUES,
        needs_gpu="the interpreter multiplies in float32 whatever it is told",
    ),
    Mutant(
        "F59",
        "NUMERIC",
        "the output is rounded to bfloat16 first",
        "float16, float32",
        (Edit(PRIMITIVES, "out.to(out_ptr.dtype.element_ty)", "out.to(tl.bfloat16).to(out_ptr.dtype.element_ty)"),),
        VALUES,
    ),
)
