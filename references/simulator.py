"""A simulator of the kernel's arithmetic, rounding by rounding, with precision faults that can be planted.

It follows the online softmax over tiles and splits and the merge by (acc, m, l), in base 2, in NumPy
float32, with the accumulators of `references.accumulators`. It serves to validate the error budget (a
correct simulated kernel never exceeds it) and the oracles (a faulty one is seen by at least one). It is
about arithmetic only: no masks of tails, no caches, no pointers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from references.accumulators import (
    Dot,
    Float32Array,
    Float64Array,
    blas_dot,
    forward_dot,
    reverse_dot,
    tensor_core_dot,
)
from references.arithmetic_model import ArithmeticModel
from references.rounding import BFLOAT16, E4M3, FLOAT16, TFLOAT32, Format, Mode, as_format, round_to
from references.tiling import MERGE_GROUP

Fault = Literal[
    "qk_fp16_accumulator",
    "pv_fp16_accumulator",
    "accumulator_bf16_per_tile",
    "exp2_bf16",
    "p_fp8",
    "no_max",
    "scale_fp16",
    "scores_fp16",
    "skipped_rescale",
    "row_sum_bf16",
    "partials_bf16",
    "merge_exp",
    "p_truncated",
    "tf32",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)

Order = Literal["blas", "forward", "reverse"]
Errors = Literal["nominal", "random", "signed"]
Tiles = Sequence[Sequence[tuple[int, int]]]

LOG2E = math.log2(math.e)
FLOAT32_LN2 = np.float32(math.log(2.0))
# A float16 accumulator is rounded once a fused step of this many products, as HMMA does.
FP16_STEP = 16
# Groups of a merge by "lse twice"; each takes every second split.
STRIDED_GROUPS = 2
# Keys per block of the score product: bounds the memory of the simulated tensor core.
SCORE_BLOCK = 2048


def simulate(
    query: Float64Array,
    key: Float64Array,
    value: Float64Array,
    visible: NDArray[np.bool_],
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
    tiles: Tiles,
    order: Order = "blas",
    errors: Errors = "nominal",
    contracted: bool = False,
    seed: int = 0,
    fault: Fault | None = None,
) -> tuple[Float64Array, Float64Array]:
    """Attend as a kernel with this arithmetic would.

    Args:
        query: [num_q_heads, q_len, head_dim], values of `fmt`.
        key, value: [num_kv_heads, kv_len, head_dim], values of `fmt`, finite.
        visible: [q_len, kv_len].
        scale: multiplies the logits.
        fmt: input and output format.
        model: accumulator, P, merge and errors of exp2, log2 and division.
        tiles: for every split the (start, stop) key ranges in the order visited.
        order: of IEEE sums; a tensor core has its own.
        errors: of exp2, log2 and division. "nominal": correctly rounded. "random": the model's largest error
            with a random sign. "signed": the largest error, with the signs that move the first output column
            of every query away from zero.
        contracted: t - m is computed as fma(z, c, -m) from the unrounded product.
        seed: of the random errors.
        fault: a precision fault to plant.

    Returns:
        out [num_q_heads, q_len, head_dim], values of `fmt`; lse [num_q_heads, q_len], values of float32.
        A query that sees no key gives 0 and -inf.
    """
    num_q_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[0]
    group_size = num_q_heads // num_kv_heads
    seen = np.tile(visible, (group_size, 1))  # [rows, kv_len]
    arithmetic = _Arithmetic(as_format(fmt), model, order, errors, contracted, fault, np.random.default_rng(seed))
    out = np.empty(query.shape)
    lse = np.empty((num_q_heads, q_len))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        for head in range(num_kv_heads):
            group = slice(head * group_size, (head + 1) * group_size)
            rows = query[group].reshape(group_size * q_len, head_dim)
            row_out, row_lse = arithmetic.attend(rows, key[head], value[head], seen, scale, tiles)
            out[group] = row_out.reshape(group_size, q_len, head_dim)
            lse[group] = row_lse.reshape(group_size, q_len)
    return out, lse


@dataclass
class _State:
    """Running softmax state of one split: acc [rows, head_dim], m_i and l_i [rows], float32."""

    acc: Float32Array
    m_i: Float32Array
    l_i: Float32Array


@dataclass
class _Arithmetic:
    fmt: Format
    model: ArithmeticModel
    order: Order
    errors: Errors
    contracted: bool
    fault: Fault | None
    rng: np.random.Generator
    dot: Dot = field(init=False)
    p_format: Format = field(init=False)
    p_rounding: Mode = field(init=False)

    def __post_init__(self) -> None:
        self.dot = {"blas": blas_dot, "forward": forward_dot, "reverse": reverse_dot}[self.order]
        if self.model.accumulator == "fused" and self.fmt.width == 16:
            self.dot = self._fused_dot
        self.p_format = E4M3 if self.fault == "p_fp8" else self.model.format_of_p(self.fmt)
        self.p_rounding = "toward_zero" if self.fault == "p_truncated" else self.model.p_rounding

    def attend(
        self,
        query: Float64Array,
        key: Float64Array,
        value: Float64Array,
        visible: NDArray[np.bool_],
        scale: float,
        tiles: Tiles,
    ) -> tuple[Float64Array, Float64Array]:
        """All queries of one kv head: query [rows, head_dim], visible [rows, kv_len]."""
        z = self._scores(query, key)
        constant = np.float32(np.float32(scale) * np.float32(LOG2E))
        if self.fault == "scale_fp16":
            constant = np.float32(np.float16(scale * LOG2E))
        t = self._work(z * constant)
        if self.fault == "scores_fp16":
            half = z.astype(np.float16) * np.float16(scale)
            t = half.astype(np.float32) * np.float32(LOG2E)
        t = np.where(visible, t, np.float32(-np.inf))
        # What exp2 is taken of, before the maximum is subtracted: exact products if contracted.
        base = z.astype(np.float64) * float(constant) if self.contracted else t.astype(np.float64)
        base = np.where(visible, base, -np.inf)
        signs = self._signs(t, value)

        states = [self._split(t, base, value, signs, split, i == 0) for i, split in enumerate(tiles)]
        merged = states[0] if len(states) == 1 else self._merge(states)
        return self._finish(merged)

    def _split(
        self,
        t: Float32Array,
        base: Float64Array,
        value: Float64Array,
        signs: Any,
        split: Sequence[tuple[int, int]],
        is_first: bool,
    ) -> _State:
        rows, head_dim = t.shape[0], value.shape[1]
        state = _State(
            np.zeros((rows, head_dim), np.float32),
            np.full(rows, -np.inf, np.float32),
            np.zeros(rows, np.float32),
        )
        for number, (start, stop) in enumerate(split):
            keys = slice(start, stop)
            m_new = np.maximum(state.m_i, t[:, keys].max(axis=1, initial=-np.inf))
            if self.fault == "no_max":
                m_new = np.where(m_new == -np.inf, m_new, np.float32(0))
            m_base = np.where(m_new == -np.inf, np.float32(0), m_new)
            alpha = self._exp2(state.m_i - m_base, 1.0)
            difference = self._work((base[:, keys] - m_base[:, None]).astype(np.float32))
            weight = self._exp2(difference, signs if np.isscalar(signs) else signs[:, keys])
            p = weight.astype(np.float64)
            if self.p_format.precision < 24:
                p = round_to(p, self.p_format, self.p_rounding, saturate=self.fault == "p_fp8")
            summed = p.astype(np.float32) if self.model.row_sum_from_p else weight

            state.l_i = self._work(self._work(state.l_i * alpha) + self._row_sum(summed))
            if self.fault == "row_sum_bf16":
                state.l_i = _narrow(state.l_i, BFLOAT16)
            skip = self.fault == "skipped_rescale" and is_first and number == 1
            acc = state.acc if skip else self._work(state.acc * alpha[:, None])
            state.acc = self._weighted_values(p, value[keys], acc)
            state.m_i = m_new
        return state

    def _merge(self, states: list[_State]) -> _State:
        partial = BFLOAT16 if self.fault == "partials_bf16" else self.model.format_of_partials(self.fmt)
        if self.model.stores_of_lse:
            states = [self._stored(state) for state in states]
        if self.model.merge == "lse twice":
            groups = [states[i::STRIDED_GROUPS] for i in range(min(len(states), STRIDED_GROUPS))]
            states = [self._stored(self._sum(group, partial)) for group in groups]
        if self.model.merge == "grouped" and len(states) > MERGE_GROUP:
            groups = [states[i : i + MERGE_GROUP] for i in range(0, len(states), MERGE_GROUP)]
            return self._sum([self._sum(group, partial) for group in groups], as_format(self.model.work_format))
        return self._sum(states, partial)

    def _stored(self, s: _State) -> _State:
        """Normalised, with its log-sum-exp for a maximum."""
        return _State(
            np.where(s.l_i[:, None] > 0, self._divide(s.acc, s.l_i[:, None]), np.float32(0)),
            np.where(s.l_i > 0, s.m_i + self._log2(s.l_i), np.float32(-np.inf)),
            (s.l_i > 0).astype(np.float32),
        )

    def _sum(self, states: list[_State], partial: Format) -> _State:
        m = np.maximum.reduce([s.m_i for s in states])
        m_base = np.where(m == -np.inf, np.float32(0), m)
        merged = _State(np.zeros_like(states[0].acc), m, np.zeros_like(m))
        for s in states:
            beta = self._exp2(s.m_i - m_base, 1.0)
            if self.fault == "merge_exp":
                beta = np.exp(s.m_i - m_base)
            acc = s.acc if partial.precision >= 24 else _narrow(s.acc, partial)
            merged.l_i = self._work(merged.l_i + self._work(s.l_i * beta))
            merged.acc = self._work(merged.acc + self._work(acc * beta[:, None]))
        return merged

    def _finish(self, state: _State) -> tuple[Float64Array, Float64Array]:
        sees = state.m_i > -np.inf
        quotient = self._divide(state.acc, state.l_i[:, None])
        out = round_to(np.where(sees[:, None], quotient, 0.0), self.fmt, self.model.output_rounding)
        lse = self._work(self._work(state.m_i + self._log2(state.l_i)) * FLOAT32_LN2)
        return out, np.where(sees, lse, -np.inf).astype(np.float64)

    def _scores(self, query: Float64Array, key: Float64Array) -> Float32Array:
        """[rows, kv_len] float32 products of queries and keys."""
        if self.model.scale_into_query:
            raise ValueError("model must not fold the scale into the query: the simulated kernel does not")
        if self.fault == "tf32":
            query, key = round_to(query, TFLOAT32), round_to(key, TFLOAT32)
        blocks = [
            self._product(query, key[i : i + SCORE_BLOCK].T, fault="qk_fp16_accumulator")
            for i in range(0, key.shape[0], SCORE_BLOCK)
        ]
        return np.concatenate(blocks, axis=1)

    def _product(
        self, a: Float64Array, b: Float64Array, c: Float32Array | None = None, *, fault: Fault
    ) -> Float32Array:
        c = np.zeros((a.shape[0], b.shape[1]), np.float32) if c is None else c
        return _fp16_dot(a, b, c) if self.fault == fault else self._work(self.dot(a, b, c))

    def _weighted_values(self, p: Float64Array, value: Float64Array, acc: Float32Array) -> Float32Array:
        """acc + p @ value, the accumulator carried through the product or added after it."""
        if self.fault == "tf32":
            p, value = round_to(p, TFLOAT32), round_to(value, TFLOAT32)
        if self.fault == "accumulator_bf16_per_tile":
            return _narrow(self.dot(p, value, acc), BFLOAT16)
        if self.model.carried or self.fault == "pv_fp16_accumulator":
            return self._product(p, value, acc, fault="pv_fp16_accumulator")
        return self._work(acc + self._product(p, value, fault="pv_fp16_accumulator"))

    def _fused_dot(self, a: Float64Array, b: Float64Array, c: Float32Array) -> Float32Array:
        return tensor_core_dot(
            a,
            b,
            c,
            terms=self.model.fused_products,
            fraction_bits=self.model.fused_fraction_bits,
            smallest_normal=self.fmt.smallest_normal,
        )

    def _row_sum(self, weight: Float32Array) -> Float32Array:
        if self.order == "blas":
            total: Float32Array = weight.sum(axis=1, dtype=np.float32)
            return total
        ordered = weight if self.order == "forward" else weight[:, ::-1]
        running: Float32Array = np.add.accumulate(ordered, axis=1, dtype=np.float32)
        return running[:, -1]

    def _signs(self, t: Float32Array, value: Float64Array) -> Any:
        """Sign of exp2's error per [rows, kv_len]: raise keys whose first value lies on out's side of out."""
        if self.errors != "signed":
            return 1.0
        weight = np.exp2(t.astype(np.float64) - np.maximum(t.max(axis=1, keepdims=True), -1e30))
        first = value[:, 0]
        mean = (weight @ first) / np.maximum(weight.sum(axis=1), 1e-300)
        return np.where((first - mean[:, None]) * np.sign(mean)[:, None] >= 0, 1.0, -1.0)

    def _error(self, bound: float, signs: Any, shape: tuple[int, ...]) -> Any:
        """Relative error, on top of the final rounding, of an operation whose error the model bounds."""
        if self.errors == "random":
            signs = self.rng.integers(0, 2, shape) * 2.0 - 1.0
        return 0.0 if self.errors == "nominal" else signs * (bound - 2.0**-24)

    def _exp2(self, x: Float32Array, signs: Any) -> Float32Array:
        if self.fault == "exp2_bf16":
            return _narrow(np.exp2(_narrow(x, BFLOAT16)), BFLOAT16)
        exact = np.exp2(x.astype(np.float64))
        error = self._error(self.model.exp2_error, signs, x.shape)
        result = np.where(x == 0, exact, exact * (1.0 + error)).astype(np.float32)
        return _flush(result) if self.model.exp2_flushes else result

    def _log2(self, x: Float32Array) -> Float32Array:
        exact = np.log2(x.astype(np.float64))
        error = self._error(self.model.log2_error, 1.0, x.shape)
        result: Float32Array = (exact + (1.0 + np.abs(exact)) * error).astype(np.float32)
        return result

    def _divide(self, a: Float32Array, b: Float32Array) -> Float32Array:
        error = self._error(self.model.division_error, 1.0, a.shape)
        return self._work((a.astype(np.float64) / b * (1.0 + error)).astype(np.float32))

    def _work(self, x: Float32Array) -> Float32Array:
        return _flush(x) if self.model.flush_to_zero else x


def _flush(x: Float32Array) -> Float32Array:
    flushed: Float32Array = np.where(np.abs(x) < 2.0**-126, np.float32(0), x)
    return flushed


def _narrow(x: Float32Array, fmt: Format) -> Float32Array:
    return round_to(x, fmt).astype(np.float32)


def _fp16_dot(a: Float64Array, b: Float64Array, c: Float32Array) -> Float32Array:
    total = c.astype(np.float64)
    for start in range(0, a.shape[1], FP16_STEP):
        step = slice(start, start + FP16_STEP)
        total = round_to(total + a[:, step] @ b[step], FLOAT16)
    return total.astype(np.float32)
