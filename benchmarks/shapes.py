"""What is timed: shapes, the grids of the suites, and how many bytes and operations a shape cannot do without."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """One attention problem.

    Attributes:
        batch, num_q_heads, num_kv_heads, head_dim: as everywhere.
        kv_len: visible keys of the longest row, the new tokens included.
        dtype: "float16", "bfloat16" or "float32".
        q_len: queries a row.
        is_causal: bottom-right alignment.
    """

    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv_len: int
    dtype: str = "float16"
    q_len: int = 1
    is_causal: bool = False

    @property
    def group_size(self) -> int:
        """Query heads a kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def name(self) -> str:
        """How tables and JSON call it: batch, q heads, kv heads, head_dim, kv_len."""
        sizes = (self.batch, self.num_q_heads, self.num_kv_heads, self.head_dim, self.kv_len)
        words = [",".join(map(str, sizes)), self.dtype]
        if self.q_len > 1:
            words += [f"q_len={self.q_len}", "causal" if self.is_causal else "full"]
        return " ".join(words)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def kv_bytes(self, kv_lens: Sequence[int] | None = None) -> int:
        """Bytes of the visible keys and values, each counted once; ``kv_lens`` for rows of different lengths."""
        tokens = self.batch * self.kv_len if kv_lens is None else sum(kv_lens)
        return 2 * tokens * self.num_kv_heads * self.head_dim * ELEMENT_BYTES[self.dtype]

    def bytes(self) -> int:
        """Bytes that must move: K and V; for more than one query also the queries and the output.

        For one query those are a thousandth of the rest and are left out, as published figures do.
        """
        if self.q_len == 1:
            return self.kv_bytes()
        queries = self.batch * self.num_q_heads * self.q_len * self.head_dim * ELEMENT_BYTES[self.dtype]
        return self.kv_bytes() + 2 * queries

    def visible_pairs(self) -> int:
        """(query, key) pairs of one head of one row that a mask leaves visible."""
        if not self.is_causal:
            return self.q_len * self.kv_len
        return sum(max(0, self.kv_len - self.q_len + i + 1) for i in range(self.q_len))

    def flops(self) -> int:
        """Floating-point operations of both matrix products, masked pairs not counted."""
        return 4 * self.batch * self.num_q_heads * self.head_dim * self.visible_pairs()


def bytes_floor_us(num_bytes: float, copy_tb_s: float) -> float:
    """Microseconds that moving the bytes takes at the measured copy bandwidth."""
    return num_bytes / copy_tb_s / 1e6


def flops_floor_us(flops: float, matmul_tflops: float) -> float:
    """Microseconds that the operations take at the measured rate of a matrix product."""
    return flops / matmul_tflops / 1e6


def rotations(set_bytes: int, l2_bytes: int, most: int = 400) -> int:
    """How many sets of inputs to rotate over, so that a set has left the L2 cache when its turn comes again."""
    return min(most, max(2, math.ceil(4 * l2_bytes / max(1, set_bytes))))


# -- the grids ---------------------------------------------------------------------------------------------------

SEED_LENGTHS = (128, 256, 512, 1024, 2048, 4096)

# (batch, q heads, kv heads, head_dim) of the variants of the seed shape that move few enough bytes.
SEED_VARIANTS = ((16, 8, 4, 64), (16, 8, 2, 64), (16, 8, 1, 64), (8, 8, 8, 64), (4, 8, 8, 64))

DECODE_HEADS = (
    (16, 8, 8, 64),
    (16, 8, 8, 128),
    (1, 32, 32, 128),
    (64, 8, 8, 128),
    (1, 32, 8, 128),
    (16, 32, 8, 128),
    (64, 32, 8, 128),
    (128, 32, 8, 128),
    (16, 8, 1, 64),
    (16, 28, 4, 128),
    (8, 9, 3, 64),
)

# In the order in which they are worth most, should the time run out.
DECODE_LENGTHS = (2048, 512, 8192, 128, 32768, 1024, 4096, 256, 16384)

RAGGED_HEADS = ((16, 8, 8, 64, 4096), (64, 32, 8, 128, 4096), (16, 32, 8, 128, 16384))
DISTRIBUTIONS = ("uniform", "bimodal", "geometric")

PREFILL_LENGTHS = (4096, 1024, 16384, 2048, 8192)
PREFILL_TOKENS = 16384


def seed_shapes(quick: bool) -> list[Shape]:
    """The specification's table."""
    return [Shape(16, 8, 8, 64, n) for n in ((512, 2048) if quick else SEED_LENGTHS)]


def seed_variants(quick: bool) -> list[Shape]:
    """What fits under the specification's 10 us at 2048 where its own shape cannot."""
    return [Shape(*heads, 2048) for heads in (SEED_VARIANTS[1:2] if quick else SEED_VARIANTS)]


def decode_shapes(quick: bool) -> list[Shape]:
    """The decode grid, most telling lengths first."""
    if quick:
        chosen = (DECODE_HEADS[0], DECODE_HEADS[4], DECODE_HEADS[5])
        return [Shape(*heads, n, "bfloat16") for n in (2048, 512) for heads in chosen]
    dtypes = ("float16", "bfloat16")
    return [Shape(*heads, n, dtype) for n in DECODE_LENGTHS for dtype in dtypes for heads in DECODE_HEADS]


def ragged_shapes(quick: bool) -> list[tuple[Shape, str]]:
    """Shapes of the longest possible row, with the distribution that lengths are drawn from."""
    if quick:
        return [(Shape(*RAGGED_HEADS[0], "bfloat16"), "bimodal")]
    return [(Shape(*heads, dtype), d) for dtype in ("bfloat16", "float16") for heads in RAGGED_HEADS
            for d in DISTRIBUTIONS]  # fmt: skip


def ragged_lengths(distribution: str, batch: int, longest: int, seed: int = 0) -> list[int]:
    """Visible keys of each row, drawn once and for all; at least 1, at most ``longest``, one row reaches it.

    Args:
        distribution: "uniform"; "bimodal": one row in sixteen is long, the others a sixteenth of it or less;
            "geometric": mean an eighth of the longest.
        batch: rows.
        longest: of a row.
        seed: of the draw.
    """
    draw = random.Random(f"{distribution} {batch} {longest} {seed}")
    if distribution == "uniform":
        lengths = [draw.randint(1, longest) for _ in range(batch)]
    elif distribution == "bimodal":
        short = max(1, longest // 16)
        lengths = [draw.randint(max(1, short // 2), short) for _ in range(batch)]
        lengths = [longest if b % 16 == 0 else n for b, n in enumerate(lengths)]
    elif distribution == "geometric":
        lengths = [min(longest, 1 + int(draw.expovariate(8 / longest))) for _ in range(batch)]
    else:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    lengths[draw.randrange(batch) if distribution != "bimodal" else 0] = longest
    return lengths


def prefill_shapes(quick: bool) -> list[Shape]:
    """Whole prompts, causal and not; as many rows as make 16k tokens, 16 heads."""
    lengths = (1024, 4096) if quick else PREFILL_LENGTHS
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float16")
    causal = (True,) if quick else (True, False)
    return [
        Shape(max(1, PREFILL_TOKENS // n), 16, 16, head_dim, n, dtype, q_len=n, is_causal=is_causal)
        for n in lengths
        for dtype in dtypes
        for is_causal in causal
        for head_dim in (64, 128)
    ]


def chunk_shapes(quick: bool) -> list[Shape]:
    """512 new tokens on 8192 cached ones."""
    heads = ((4, 16, 16, 128),) if quick else ((4, 16, 16, 64), (4, 16, 16, 128), (1, 32, 8, 128))
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float16")
    return [Shape(*h, 8192 + 512, dtype, q_len=512, is_causal=True) for dtype in dtypes for h in heads]


# -- tiny shapes for Triton's interpreter ------------------------------------------------------------------------


def interpreted_decode() -> list[Shape]:
    """Shapes that the interpreter gets through in a second."""
    return [Shape(2, 2, 1, 16, 64), Shape(1, 2, 2, 16, 160, "bfloat16")]


def interpreted_prefill() -> list[Shape]:
    """The same for prefill."""
    return [Shape(1, 2, 2, 16, 48, q_len=48, is_causal=True)]


def interpreted_chunk() -> list[Shape]:
    """The same for a chunk on a cache."""
    return [Shape(1, 2, 1, 16, 80, q_len=16, is_causal=True)]
