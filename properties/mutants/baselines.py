"""What other suites check: four fixed tests at 1e-3, and a grid of shapes at 1.5e-2, on N(0, 1), against PyTorch.

They are here to be compared with: the score says which planted faults they would have let through.
Each function returns the first difference in words, or "" if the kernel passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from properties import device as devices

BASELINES = {"four tests at 1e-3": "four_fixed_tests", "grid at 1.5e-2": "fixed_grid"}


@dataclass(frozen=True)
class Shape:
    """One point of the grid: a batch of equal lengths."""

    dtype: torch.dtype
    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    cached: int
    q_len: int
    is_causal: bool = False


FLOAT32 = Shape(torch.float32, 2, 4, 4, 64, 0, 64)
FLOAT16 = Shape(torch.float16, 1, 8, 8, 64, 0, 64)
BFLOAT16 = Shape(torch.bfloat16, 1, 8, 2, 128, 0, 24)

GRID = (
    Shape(torch.float16, 1, 4, 4, 64, 0, 128, True),
    Shape(torch.float16, 2, 4, 2, 64, 0, 64, True),
    Shape(torch.float16, 2, 4, 1, 128, 128, 1),
    Shape(torch.float16, 2, 8, 2, 64, 512, 1),
    Shape(torch.float16, 1, 2, 2, 64, 1024, 1),
    Shape(torch.float16, 1, 4, 4, 128, 256, 4, True),
    Shape(torch.bfloat16, 2, 4, 2, 64, 100, 1),
    Shape(torch.bfloat16, 1, 4, 4, 128, 0, 96, True),
    Shape(torch.bfloat16, 2, 4, 1, 64, 256, 8, True),
    Shape(torch.float32, 2, 4, 4, 64, 64, 1),
    Shape(torch.float32, 1, 4, 2, 32, 0, 100, True),
    Shape(torch.float32, 1, 2, 2, 64, 200, 16, True),
)


def _normal(generator: torch.Generator, shape: Shape, heads: int, tokens: int) -> torch.Tensor:
    numbers = torch.randn(shape.batch, heads, tokens, shape.head_dim, generator=generator)
    return numbers.to(shape.dtype).to(devices.current())


def _expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """PyTorch's attention in float32, queries at the end of the keys."""
    q_len, kv_len = q.shape[2], k.shape[2]
    visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device)
    visible = visible.tril(kv_len - q_len) if is_causal else visible
    return scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1]
    ).to(q.dtype)


def _difference(what: str, got: Any, q: Any, k: Any, v: Any, is_causal: bool, atol: float, rtol: float) -> str:
    expected = _expected(q, k, v, is_causal)
    if torch.allclose(got.float(), expected.float(), atol=atol, rtol=rtol):
        return ""
    return f"{what}: off by up to {float((got.float() - expected.float()).abs().max()):.1e}"


def _decode(shape: Shape, prompt: int, steps: int, tolerance: float) -> Iterator[str]:
    """A prompt into an empty cache, then tokens one by one, each against the whole sequence."""
    import flashcore

    generator = torch.Generator().manual_seed(0)
    cache: Any = None
    k_all = v_all = _normal(generator, shape, shape.num_kv_heads, 0)
    for q_len in (prompt, *[1] * steps):
        q = _normal(generator, shape, shape.num_q_heads, q_len)
        k, v = (_normal(generator, shape, shape.num_kv_heads, q_len) for _ in range(2))
        k_all, v_all = torch.cat([k_all, k], 2), torch.cat([v_all, v], 2)
        out, cache = flashcore.attention_with_kv_cache(q, k, v, cache, cache_max_len=512)  # type: ignore[misc]
        # bfloat16 has 8 bits: at 1e-3 it would fail on rounding, so it gets the usual exception.
        rtol = 1e-2 if shape.dtype == torch.bfloat16 else tolerance
        yield _difference(f"step of {q_len}", out, q, k_all, v_all, False, max(rtol, tolerance), rtol)


def _one_step(shape: Shape, atol: float, rtol: float, spare: int) -> str:
    """New tokens on a cache of ``shape.cached``, in buffers with ``spare`` slots more than that."""
    import flashcore

    generator = torch.Generator().manual_seed(1)
    q = _normal(generator, shape, shape.num_q_heads, shape.q_len)
    k, v = (_normal(generator, shape, shape.num_kv_heads, shape.cached + shape.q_len) for _ in range(2))
    old = shape.cached
    buffers = tuple(torch.zeros_like(t[:, :, :1]).repeat(1, 1, old + spare, 1) for t in (k, v))
    for buffer, tokens in zip(buffers, (k, v), strict=True):
        buffer[:, :, :old] = tokens[:, :, :old]
    given: dict[str, Any] = {"past_key_value": buffers} if old + spare else {}
    if given:
        given["seq_lens"] = torch.full((shape.batch,), old, dtype=torch.int32, device=q.device)
    out = flashcore.attention_with_kv_cache(q, k[:, :, old:], v[:, :, old:], **given, is_causal=shape.is_causal)[0]
    return _difference(f"{shape}", out, q, k, v, shape.is_causal, atol, rtol)


def _first(differences: Iterator[str]) -> str:
    try:
        return next((difference for difference in differences if difference), "")
    except Exception as error:  # a kernel that raises fails any suite
        return f"raised {type(error).__name__}: {error}"


def four_fixed_tests() -> str:
    """The specification's: prefill and 10 steps; a first call; one step on 256 tokens; three configurations."""

    def differences() -> Iterator[str]:
        yield from _decode(FLOAT32, 64, 10, 1e-3)
        yield from _decode(FLOAT32, 32, 0, 1e-3)
        yield _one_step(Shape(torch.float32, 2, 4, 4, 64, 256, 1), 1e-3, 1e-3, 0)
        for shape in (FLOAT32, FLOAT16, BFLOAT16):
            yield from _decode(shape, shape.q_len, 1, 1e-3)

    return _first(differences())


def fixed_grid() -> str:
    """A dozen shapes, prefill and decode, as existing suites have them: atol 1.5e-2, rtol 1e-2."""
    return _first(_one_step(shape, 1.5e-2, 1e-2, 16) for shape in GRID)
