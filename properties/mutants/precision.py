"""Precisions: an intermediate result in a format narrower than the declared one, or rounded another way.

The faults of ``references.simulator``, planted in the kernels' own source; docs/numerics.md says what sees which.
"""

from __future__ import annotations

from properties.mutants.mutant import PREFILL, PRIMITIVES, SPLIT_KV, Edit, Mutant
from properties.mutants.numeric import FOLD, VALUES, both_logits

_HEAD_SIZE = "    head_dim = known_multiple_of_8(head_dim)\n"
_SUM = "l_i = l_i * alpha + tl.sum(p, axis=1)"
_WEIGHTS = "p = tl.exp2(logits - m_base[:, None])  # [BLOCK_M, BLOCK_N]\n"
_MERGED_SPLIT = "beta = tl.exp2(m_s - m_base)"
_FOLDED = "return online_softmax_update(acc, m_i, l_i, logits, v)\n"
_UPDATE = "def online_softmax_update(acc, m_i, l_i, logits, v):\n"
_TILE_END = "head_dim, MASK_N, MASK_D, STREAMED)\n    "
_HELPERS = "@triton.jit\ndef load_tile(\n"

_FLOAT16_DOT = """\
@triton.jit
def float16_dot(a, b, acc):
    K: tl.constexpr = a.shape[1]
    offs_k = tl.arange(0, K)
    for start in tl.static_range(0, K, 16):
        step = (offs_k >= start) & (offs_k < start + 16)
        acc = tl.dot(tl.where(step[None, :], a, 0.0), b, acc, input_precision="ieee").to(tl.float16).to(tl.float32)
    return acc


"""
# Not the cast of Triton 3.9's interpreter, which loses the carry of a significand that rounds up to 2.
_FLOAT8 = """\
@triton.jit
def float8_e4m3(p):
    bits = p.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(p < 0.015625, (p + 24576.0) - 24576.0, normal)


"""
_TFLOAT32 = """\
@triton.jit
def tfloat32(x):
    if x.dtype == tl.float32:
        x = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return x


"""
# Nor its cast toward zero, which takes a subnormal float32 for a larger number.
_TRUNCATED = """\
@triton.jit
def truncated(p, dtype: tl.constexpr):
    bits = p.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:
        p = (bits & -0x10000).to(tl.float32, bitcast=True)
    if dtype == tl.float16:
        subnormal = (p * 16777216.0).to(tl.int32).to(tl.float32) / 16777216.0
        p = tl.where(p < 0.00006103515625, subnormal, (bits & -0x2000).to(tl.float32, bitcast=True))
    return p


"""


def _with_helper(helper: str) -> Edit:
    """A function above the first one of the primitives."""
    return Edit(PRIMITIVES, _HELPERS, helper + _HELPERS)


def _bfloat16(anchor: str, argument: str) -> Edit:
    """Argument and result of an exp2 rounded to bfloat16."""
    narrow = f"tl.exp2(({argument}).to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16).to(tl.float32)"
    return Edit(PRIMITIVES, anchor, anchor.replace(f"tl.exp2({argument})", narrow))


MUTANTS = (
    Mutant(
        "F312",
        "NUMERIC",
        "the scores are accumulated in float16",
        "every input; most with head_dim above 16",
        (
            _with_helper(_FLOAT16_DOT),
            *both_logits("float16_dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * qk_scale"),
        ),
        VALUES,
    ),
    Mutant(
        "F313",
        "NUMERIC",
        "P.V is accumulated in float16",
        "every input",
        (
            _with_helper(_FLOAT16_DOT),
            Edit(PRIMITIVES, FOLD, "acc = float16_dot(p.to(v.dtype), v, acc * alpha[:, None])"),
        ),
        VALUES,
    ),
    Mutant(
        "F314",
        "NUMERIC",
        "the accumulator is rounded to bfloat16 after every tile, whatever the input's format",
        "every input",
        (Edit(PRIMITIVES, FOLD, FOLD + ".to(tl.bfloat16).to(tl.float32)"),),
        VALUES,
    ),
    Mutant(
        "F315",
        "NUMERIC",
        "exp2 is taken of bfloat16 and rounded to bfloat16",
        "more than one key",
        (
            _bfloat16("alpha = tl.exp2(m_i - m_base)  # [BLOCK_M]; 0", "m_i - m_base"),
            _bfloat16(_WEIGHTS, "logits - m_base[:, None]"),
            _bfloat16("alpha = tl.exp2(m_i - m_base)\n    beta", "m_i - m_base"),
            _bfloat16(_MERGED_SPLIT, "m_s - m_base"),
        ),
        VALUES,
    ),
    Mutant(
        "F316",
        "NUMERIC",
        "weights are rounded to 8 bits (e4m3) before P.V",
        "more than one key",
        (_with_helper(_FLOAT8), Edit(PRIMITIVES, FOLD, FOLD.replace("p.to(v.dtype)", "float8_e4m3(p).to(v.dtype)"))),
        VALUES,
    ),
    Mutant(
        "F317",
        "NUMERIC",
        "the constant scale * log2(e) is held in float16",
        "every scale that is not a float16",
        tuple(
            Edit(file, _HEAD_SIZE, _HEAD_SIZE + "    qk_scale = tl.cast(qk_scale, tl.float16).to(tl.float32)\n")
            for file in (SPLIT_KV, PREFILL)
        ),
        VALUES,
    ),
    Mutant(
        "F318",
        "NUMERIC",
        "scores times scale is computed in float16",
        "logits that are not float16",
        both_logits(
            '(tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float16)'
            " * tl.cast(qk_scale * 0.6931472, tl.float16)).to(tl.float32) * 1.4426950"
        ),
        VALUES,
    ),
    Mutant(
        "F319",
        "NUMERIC",
        "the accumulator is not rescaled at the second tile of a segment",
        "two tiles, the second with the larger logit",
        (
            Edit(PRIMITIVES, _UPDATE, _UPDATE.replace("v):", "v, skip=False):")),
            Edit(PRIMITIVES, FOLD, FOLD.replace("alpha[:, None]", "tl.where(skip, 1.0, alpha)[:, None]")),
            Edit(
                PRIMITIVES,
                _TILE_END + _FOLDED,
                _TILE_END + _FOLDED.replace("v)", "v, start_n == BLOCK_N)"),
            ),
        ),
        VALUES,
    ),
    Mutant(
        "F320",
        "NUMERIC",
        "the sum of weights is rounded to bfloat16 after every tile",
        "more than one key",
        (Edit(PRIMITIVES, _SUM, f"l_i = ({_SUM.removeprefix('l_i = ')}).to(tl.bfloat16).to(tl.float32)"),),
        VALUES,
    ),
    Mutant(
        "F321",
        "NUMERIC",
        "partials are kept in bfloat16, whatever the input's format",
        "splits > 1",
        (
            Edit(
                SPLIT_KV,
                "+ in_partial, acc, mask=partial_mask)",
                "+ in_partial, acc.to(tl.bfloat16).to(tl.float32), mask=partial_mask)",
            ),
        ),
        ("every_kernel_decodes_alike", *VALUES),
    ),
    Mutant(
        "F322",
        "NUMERIC",
        "the merge weighs splits with exp for exp2",
        "splits > 1 with different maxima",
        (Edit(PRIMITIVES, _MERGED_SPLIT, _MERGED_SPLIT.replace("exp2", "exp")),),
        VALUES,
    ),
    Mutant(
        "F323",
        "NUMERIC",
        "weights are truncated to the input's format",
        "float16, bfloat16",
        (
            _with_helper(_TRUNCATED),
            Edit(PRIMITIVES, FOLD, FOLD.replace("p.to(v.dtype)", "truncated(p, v.dtype).to(v.dtype)")),
        ),
        (*VALUES, "rounding_noise"),
    ),
    Mutant(
        "F324",
        "NUMERIC",
        "float32 operands are cut to TF32",
        "float32",
        (
            _with_helper(_TFLOAT32),
            *both_logits('tl.dot(tfloat32(q), tl.trans(tfloat32(k)), input_precision="ieee") * qk_scale'),
            Edit(PRIMITIVES, FOLD, FOLD.replace("p.to(v.dtype), v,", "tfloat32(p.to(v.dtype)), tfloat32(v),")),
        ),
        VALUES,
    ),
)
