"""Value families for the numerics experiments: ordinary data, and data built to make one error term large.

`make(name, ...)` gives one sequence. All queries of a head share its keys, as in a kernel, so a family is a
statement about (keys, values) and about how the queries of a head differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.rounding import Format, round_to

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """One sequence: query [num_q_heads, q_len, head_dim], key and value [num_kv_heads, kv_len, head_dim]."""

    query: Float64Array
    key: Float64Array
    value: Float64Array
    visible: NDArray[np.bool_]
    scale: float


@dataclass
class _Draft:
    """What a family starts from and edits: Gaussian q [rows, D], k and v [n, D] of one head."""

    q: Float64Array
    k: Float64Array
    v: Float64Array
    scale: float
    fmt: Format
    rng: np.random.Generator

    @property
    def direction(self) -> Float64Array:
        unit: Float64Array = self.q[0] / np.linalg.norm(self.q[0])
        return unit

    def align_queries(self) -> None:
        """Make all queries near multiples of the first, so that a trend along it is seen by all."""
        gains = 0.75 + 0.5 * self.rng.random((len(self.q), 1))
        self.q = self.q[0] * gains + 0.05 * self.q

    def exact_logits(self, logits: Float64Array) -> None:
        """Set logits, scale 1, as high + low parts in two dimensions; queries are (1, 1, 0, ...)."""
        self.scale = 1.0
        self.q = np.zeros_like(self.q)
        self.k = np.zeros_like(self.k)
        if self.q.shape[1] == 1:
            self.q[:] = 1.0
            self.k[:, 0] = round_to(logits, self.fmt)
            return
        self.q[:, :2] = 1.0
        high = round_to(logits, self.fmt)
        self.k[:, 0] = high
        self.k[:, 1] = round_to(logits - high, self.fmt)


def _gauss(d: _Draft) -> None:
    """N(0, 1)."""


def _large_logits(d: _Draft) -> None:
    """Logits with standard deviation 30."""
    d.q *= 30


def _huge_logits(d: _Draft) -> None:
    """Logits near the top of float16, or 1000."""
    d.q *= 300 if d.fmt.name == "float16" else 1000


def _dynamic_range(d: _Draft) -> None:
    """Every element scaled by its own power of two."""
    d.q *= np.exp2(d.rng.integers(-8, 5, d.q.shape))
    d.k *= np.exp2(d.rng.integers(-8, 5, d.k.shape))
    d.v *= np.exp2(d.rng.integers(-12, 8, d.v.shape))


def _near_ties(d: _Draft) -> None:
    """Keys that differ in the last bit."""
    d.k = d.k[:1] * (1 + d.rng.integers(-1, 2, d.k.shape) * 2.0**-d.fmt.precision)
    d.q *= 4


def _all_equal(d: _Draft) -> None:
    """One key, repeated."""
    d.k = np.repeat(d.k[:1], len(d.k), axis=0)
    d.q *= 4


def _subnormal(d: _Draft) -> None:
    """Subnormal keys and values in float16, tiny ones otherwise."""
    half = d.fmt.name == "float16"
    d.q *= 64
    d.k *= 2.0**-14 if half else 2.0**-60
    d.v *= 2.0 ** (d.fmt.emin - 3) if half else 2.0**-30


def _peaked(d: _Draft) -> None:
    """One key dominates."""
    d.align_queries()
    d.k[d.rng.integers(len(d.k))] = d.q[0] * 3.0


def _rising(d: _Draft) -> None:
    """The running maximum rises in every tile."""
    d.align_queries()
    steps = np.linspace(0, 30 / d.scale / np.linalg.norm(d.q[0]), len(d.k))
    d.k = 0.3 * d.k + np.outer(steps, d.direction)


def _falling(d: _Draft) -> None:
    """The first key is the largest, the rest falls away."""
    _rising(d)
    d.k = d.k[::-1].copy()


def _positive(d: _Draft) -> None:
    """Values in 0.5 and above: nothing cancels."""
    d.v = np.abs(d.v) + 0.5


def _big_values(d: _Draft) -> None:
    """Values near the top of the format, sums far from overflow."""
    d.v *= 8000 if d.fmt.name == "float16" else 1e30


def _constant_values(d: _Draft) -> None:
    """One value, repeated: the centred error terms vanish."""
    d.v = np.repeat(d.v[:1], len(d.v), axis=0)


def _coherent(d: _Draft) -> None:
    """Every P just past a rounding midpoint, values of one sign: all roundings of P add up."""
    unit = d.fmt.unit_roundoff() if d.fmt.width == 16 else 2.0**-11
    d.exact_logits(np.full(len(d.k), math.log(0.5 * (1 + 1.06 * unit))))
    d.k[0] = 0.0
    d.v = np.abs(d.v) + 0.5
    d.v[0] = 0.0


def _zero_query(d: _Draft) -> None:
    """All logits zero."""
    d.q *= 0


def _integers(d: _Draft) -> None:
    """Small integers everywhere."""
    d.q = d.rng.integers(-3, 4, d.q.shape).astype(float)
    d.k = d.rng.integers(-3, 4, d.k.shape).astype(float)
    d.v = d.rng.integers(-8, 9, d.v.shape).astype(float)


def _flat_tail(d: _Draft) -> None:
    """One peak, all other P just below the smallest float16."""
    d.align_queries()
    d.k *= 0.01
    d.k[d.rng.integers(len(d.k))] = d.direction * 17.0 / d.scale / np.linalg.norm(d.q[0])
    d.v = np.abs(d.v) + 0.5


def _two_level(d: _Draft) -> None:
    """One heavy key against many light ones of the same total weight and opposite value."""
    logits = np.full(len(d.k), -math.log(max(len(d.k) - 1, 2)))
    heavy = int(d.rng.integers(len(d.k)))
    logits[heavy] = 0.0
    d.exact_logits(logits)
    d.v = -(1 + 0.5 * d.rng.random(d.v.shape))
    d.v[heavy] *= -1


def _level(d: _Draft) -> None:
    """One random weight shared by all keys but the first, whose value is zero."""
    d.exact_logits(np.full(len(d.k), -d.rng.uniform(0.02, 6.0)))
    d.k[0] = 0.0
    d.v = np.abs(d.v) + 0.5
    d.v[0] = 0.0


def _swamp(d: _Draft) -> None:
    """Equal logits and positive values: the accumulator grows until small terms are swamped."""
    d.k = np.repeat(d.k[:1], len(d.k), axis=0)
    d.v = np.abs(d.v) + 0.5


def _big_lse(d: _Draft) -> None:
    """All logits near 1000 * scale, in one dimension."""
    d.q = np.zeros_like(d.q)
    d.q[:, 0] = 1.0
    d.k = np.zeros_like(d.k)
    d.k[:, 0] = d.rng.uniform(900, 1000, len(d.k))


def _cancel_qk(d: _Draft) -> None:
    """Large score products that cancel in pairs."""
    half = d.k.shape[1] // 2
    d.q *= 8
    d.k *= 8
    d.k[:, half : 2 * half] = -d.k[:, :half]
    d.q[:, half : 2 * half] = d.q[:, :half]
    d.k += 0.05 * d.rng.standard_normal(d.k.shape)


FAMILIES: dict[str, Callable[[_Draft], None]] = {
    "gauss": _gauss,
    "large_logits": _large_logits,
    "huge_logits": _huge_logits,
    "dynamic_range": _dynamic_range,
    "near_ties": _near_ties,
    "all_equal": _all_equal,
    "subnormal": _subnormal,
    "peaked": _peaked,
    "rising": _rising,
    "falling": _falling,
    "positive": _positive,
    "big_values": _big_values,
    "constant_values": _constant_values,
    "coherent": _coherent,
    "zero_query": _zero_query,
    "integers": _integers,
    "flat_tail": _flat_tail,
    "two_level": _two_level,
    "level": _level,
    "swamp": _swamp,
    "big_lse": _big_lse,
    "cancel_qk": _cancel_qk,
}


def make(
    family: str,
    *,
    num_kv_heads: int,
    rows: int,
    kv_len: int,
    head_dim: int,
    fmt: Format,
    is_causal: bool,
    seed: int,
) -> Problem:
    """One sequence of a family: `rows` queries a kv head, one query head a kv head.

    Causal is bottom-right; with it, queries that are equal still see different keys.
    """
    rng = np.random.default_rng([seed, kv_len, head_dim, rows, list(FAMILIES).index(family)])
    heads = []
    for _ in range(num_kv_heads):
        shapes = (rows, head_dim), (kv_len, head_dim), (kv_len, head_dim)
        q, k, v = (rng.standard_normal(shape) for shape in shapes)
        draft = _Draft(q, k, v, head_dim**-0.5, fmt, rng)
        FAMILIES[family](draft)
        heads.append(draft)
    limit = fmt.max_finite / 4
    query, key, value = (
        np.stack([round_to(np.clip(getattr(d, name), -limit, limit), fmt) for d in heads]) for name in "qkv"
    )
    visible = np.ones((rows, kv_len), bool)
    if is_causal:
        visible = np.tril(visible, kv_len - rows)
    return Problem(query, key, value, visible, heads[0].scale)
