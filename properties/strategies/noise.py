"""Problems whose errors are a fair sample of rounding: Gaussian data, thousands of outputs each."""

from __future__ import annotations

from typing import Literal

from hypothesis import strategies as st

from properties.case import Case, Row
from properties.strategies.choices import choose

Dtype = Literal["float32", "float16", "bfloat16"]


@st.composite
def noise_cases(draw: st.DrawFn, dtypes: tuple[Dtype, ...] = ("float16", "bfloat16")) -> Case:
    """Draw one call with 64 queries a head pair and 4,096 outputs or more, over up to 400 keys."""
    cached = 32 * choose(draw, "blocks of cached keys", (1, 2, 4, 0, 8, 11)) + choose(draw, "odd keys", (0, 1, 17, 31))
    new = choose(draw, "queries", (32, 64))
    heads = 128 // new
    block_n = choose(draw, "block_n", (None, 32, 64))
    return Case(
        rows=(Row(cached=cached, new=(new,)),),
        num_kv_heads=choose(draw, "kv heads", (heads, heads // 2)),
        group_size=1,
        head_dim=choose(draw, "head_dim", (64, 80, 128)),
        dtype=choose(draw, "dtype", dtypes),
        is_causal=choose(draw, "causal", (False, True)),
        start="tuple",
        capacity=max(cached, 1) + new,
        cache_max_len=max(cached, 1) + new,
        block_n=block_n,
        kv_split_size=block_n and choose(draw, "splits", (None, 2 * block_n)),
        values="normal",
        seed=draw(st.integers(0, 2**16 - 1)),
    )
