"""Dense softmax attention in float64: the oracle every kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def num_visible_keys(i: int, q_len: int, kv_len: int, is_causal: bool) -> int:
    """How many keys query ``i`` sees; they are always the first ones.

    Causal attention is aligned bottom-right: the last query sees every key, the one before it one key fewer.
    For q_len=2, kv_len=5 (1 = visible), and for q_len=3, kv_len=2:

        1 1 1 1 0        0 0
        1 1 1 1 1        1 0
                         1 1
    """
    return max(0, kv_len - q_len + i + 1) if is_causal else kv_len


def visible_keys(q_len: int, kv_len: int, is_causal: bool) -> BoolArray:
    """The mask [q_len, kv_len] of ``num_visible_keys``."""
    visible = np.zeros((q_len, kv_len), dtype=np.bool_)
    for i in range(q_len):
        visible[i, : num_visible_keys(i, q_len, kv_len, is_causal)] = True
    return visible


def attention(
    query: Float64Array,
    key: Float64Array,
    value: Float64Array,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Float64Array, Float64Array]:
    """Attend from every query of one sequence to the keys it may see.

        out[h, i] = sum_j softmax_j(scale * <query[h, i], key[g, j]>) * value[g, j],   g = h // group_size

    Non-finite inputs propagate to the queries that see them, without a warning.

    Args:
        query: [num_q_heads, q_len, head_dim]
        key: [num_kv_heads, kv_len, head_dim]
        value: [num_kv_heads, kv_len, head_dim]
        is_causal: aligned bottom-right, see ``num_visible_keys``.
        scale: multiplies the logits.

    Returns:
        out: [num_q_heads, q_len, head_dim]; zeros where a query sees no key.
        lse: [num_q_heads, q_len], natural log of the sum of exp of the logits; -inf where it sees no key.

    Raises:
        ValueError: num_q_heads is not a multiple of num_kv_heads.

    Error:
        ``error_bounds.budget`` with ``arithmetic_model.REFERENCE``.

    Source:
        Vaswani et al. 2017, equation 1.
    """
    num_q_heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len, _ = key.shape
    if num_kv_heads == 0 or num_q_heads % num_kv_heads != 0:
        raise ValueError(f"num_q_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_q_heads}")
    group_size = num_q_heads // num_kv_heads

    out = np.zeros((num_q_heads, q_len, head_dim))
    lse = np.full((num_q_heads, q_len), -np.inf)
    for h in range(num_q_heads):
        for i in range(q_len):
            n = num_visible_keys(i, q_len, kv_len, is_causal)
            if n == 0:
                continue
            # Hidden keys are cut off, not multiplied by zero: 0 * NaN is NaN.
            keys = key[h // group_size, :n]
            values = value[h // group_size, :n]
            with np.errstate(invalid="ignore", over="ignore", under="ignore"):
                logits = scale * (keys @ query[h, i])  # [n]
                peak = logits.max()
                weights = np.exp(logits - peak)  # [n]
                out[h, i] = weights @ values / weights.sum()
                lse[h, i] = peak + np.log(weights.sum())
    return out, lse
