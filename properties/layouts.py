"""How tensors lie in memory: the strides that the name of a layout stands for.

A tensor is always [batch, heads, tokens, head_dim] to its caller. What its strides skip is a gap, which nobody
may read or write.
"""

from __future__ import annotations

from collections.abc import Sequence


def strides(shape: Sequence[int], layout: str, *, of_values: bool = False) -> tuple[int, int, int, int]:
    """Strides in elements of a tensor whose first element is the first of its memory.

    Args:
        shape: [batch, heads, tokens, head_dim]
        layout: "contiguous".
            "transposed": memory is [batch, tokens, heads, head_dim], as a projection leaves it.
            "padded": after each token 8 elements are left out, 16 of a value tensor: what lies past head_dim is not the
            next token. With a head_dim that is a multiple of 8 every vector of a head is aligned.
            "gapped": every second element, and after each token, head and batch row an element, a token and a
                head left out; a token's stride is odd, so hardly anything is aligned.
            "expanded_heads": one head's memory for all heads (stride 0); never written.
        of_values: a value tensor lies otherwise than the key tensor of the same layout, so that a kernel which takes
            one's strides for the other's is seen. "transposed": 8 elements after each token are left out, 4 of an odd
            number of tokens: then vectors of 8 are not aligned, those of 4 are. "gapped":
            whole tokens, 8 elements apart; the stride of a head is odd.
    """
    _, heads, tokens, head_dim = shape
    if layout == "contiguous":
        return (heads * tokens * head_dim, tokens * head_dim, head_dim, 1)
    if layout == "padded":
        token = head_dim + (16 if of_values else 8)
        return (heads * tokens * token, tokens * token, token, 1)
    if layout == "transposed" and of_values:
        token = heads * head_dim + (4 if tokens % 2 else 8)
        return (tokens * token, head_dim, token, 1)
    if layout == "gapped" and of_values:
        token = head_dim + 8
        head = (tokens + 1) * token + (tokens + 1) * token % 2 + 1
        return (-(-(heads + 1) * head // 8) * 8, head, token, 1)
    if layout == "transposed":
        return (tokens * heads * head_dim, head_dim, heads * head_dim, 1)
    if layout == "gapped":
        token = 2 * head_dim + 1
        head = (tokens + 1) * token
        return ((heads + 1) * head, head, token, 2)
    if layout == "expanded_heads":
        return (tokens * head_dim, 0, head_dim, 1)
    raise ValueError(f"layout must be one of properties.case.LAYOUTS, got {layout!r}")
