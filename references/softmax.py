"""The exact softmax of one sequence and the sizes that its errors are multiples of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from references.rounding import Format

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


@dataclass(frozen=True)
class Sequences:
    """Several sequences as one array each: the rows of all, one after the other, and as many keys as the longest has.

    A row is a query of one of the group_size query heads of a kv head.

    Attributes:
        query: [num_kv_heads, rows, head_dim]
        key, value: [num_kv_heads, keys of all sequences, head_dim]
        rows: of each sequence.
        keys: of each sequence, in ``key`` and ``value``.
        visible: [rows, kv_len] of each sequence.
    """

    query: Float64Array
    key: Float64Array
    value: Float64Array
    rows: list[slice]
    keys: list[slice]
    visible: list[BoolArray]

    @cached_property
    def kv_len(self) -> int:
        """Keys of the longest sequence."""
        return max(int(keys.stop) - int(keys.start) for keys in self.keys)

    @cached_property
    def hidden(self) -> BoolArray | None:
        """[rows, kv_len]: which keys a row does not see; None if every row sees every key."""
        if len(self.visible) == 1:
            return None if self.visible[0].all() else ~self.visible[0]
        hidden = np.ones((self.query.shape[1], self.kv_len), dtype=np.bool_)
        for rows, visible in zip(self.rows, self.visible, strict=True):
            np.logical_not(visible, out=hidden[rows, : visible.shape[1]])
        return hidden if hidden.any() else None

    def scores(self, query: Float64Array, key: Float64Array) -> Float64Array:
        """query . key, [num_kv_heads, rows, kv_len]; 0 beyond the keys of a sequence."""
        if len(self.rows) == 1:
            return query @ key.swapaxes(-1, -2)
        key = key.swapaxes(-1, -2)
        result = np.zeros((*query.shape[:2], self.kv_len))
        for rows, keys in zip(self.rows, self.keys, strict=True):
            np.matmul(query[:, rows], key[:, :, keys], out=result[:, rows, : keys.stop - keys.start])
        return result

    def sums(self, weight: Float64Array, value: Float64Array) -> Float64Array:
        """Sums of values like ``value`` with weights [num_kv_heads, rows, kv_len]: [num_kv_heads, rows, head_dim]."""
        if len(self.rows) == 1:
            return weight @ value
        result = np.empty((*weight.shape[:2], value.shape[-1]))
        for rows, keys in zip(self.rows, self.keys, strict=True):
            np.matmul(weight[:, rows, : keys.stop - keys.start], value[:, keys], out=result[:, rows])
        return result

    @cached_property
    def sizes(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Of every sequence: first row, rows, first key, keys."""
        spans = [
            (r.start, r.stop - r.start, k.start, k.stop - k.start) for r, k in zip(self.rows, self.keys, strict=True)
        ]
        first_row, rows, first_key, keys = np.array(spans).T
        return first_row, rows, first_key, keys

    @cached_property
    def first_key(self) -> IntArray:
        """[rows]: where in ``key`` the keys of the sequence of each row begin."""
        return np.repeat(self.sizes[2], self.sizes[1])

    def of_rows(self, sequences: Float64Array) -> Float64Array:
        """[.., sequences, columns] to [.., rows, columns], or what broadcasts to it."""
        return sequences if len(self.rows) == 1 else np.repeat(sequences, self.sizes[1], axis=-2)

    def of_keys(self, sequences: Float64Array) -> Float64Array:
        """[.., sequences, columns] to the shape of ``key``, or what broadcasts to it."""
        return sequences if len(self.rows) == 1 else np.repeat(sequences, self.sizes[3], axis=-2)

    def over_keys(self, x: Float64Array) -> Float64Array:
        """Sums [.., sequences, columns] over the keys of each sequence."""
        return x.sum(axis=-2, keepdims=True) if len(self.rows) == 1 else np.add.reduceat(x, self.sizes[2], axis=-2)


@dataclass(frozen=True)
class Softmax:
    """Logits in base 2 and their weights; [num_kv_heads, rows, kv_len] unless said otherwise.

    Hidden keys have weight and gap 0; the sizes say nothing of them.
    """

    hidden: BoolArray | None  # [rows, kv_len]; None: every row sees every key
    blind: BoolArray | None  # [rows] which see no key; None: there is none
    logit: Float64Array  # -inf where hidden
    magnitude: Float64Array  # abs(logit)
    products: Float64Array  # sum_d abs(q_d k_d), subnormal factors lifted: what rounding errors of q.k are relative to
    gap: Float64Array  # distance of the logit from the largest one, in octaves
    largest_gap: float
    top: NDArray[np.intp]  # [num_kv_heads, rows] key of the largest logit, counted in its sequence
    peak: Float64Array  # [num_kv_heads, rows] largest logit, 0 without keys
    total: Float64Array  # [num_kv_heads, rows] sum of 2**-gap, 1 without keys
    weight: Float64Array


@dataclass(frozen=True)
class Magnitudes:
    """abs of queries, keys and values, subnormal numbers lifted where a tensor core lifts them."""

    query: Float64Array
    key: Float64Array
    value: Float64Array  # not lifted
    lifted_value: Float64Array  # the same object as ``value`` if nothing is lifted
    largest: tuple[float, float, float]  # not lifted; NaN or infinite if an input is


def lifted_magnitude(magnitude: Float64Array, fmt: Format, fused: bool) -> Float64Array:
    """Magnitudes as a tensor core aligns them: subnormal numbers count as the smallest normal one."""
    if not fused or magnitude.min(initial=np.inf) >= fmt.smallest_normal:
        return magnitude
    return np.where(magnitude > 0, np.maximum(magnitude, fmt.smallest_normal), 0.0)


def magnitudes_of(sequences: Sequences, fmt: Format, fused: bool) -> Magnitudes:
    """The magnitudes of all inputs."""
    query, key, value = np.abs(sequences.query), np.abs(sequences.key), np.abs(sequences.value)
    largest = (float(query.max()), float(key.max()), float(value.max()))
    lifted = value
    if fused:
        query, key, lifted = (lifted_magnitude(x, fmt, fused) for x in (query, key, value))
        if lifted is not value and np.array_equal(lifted, value):
            lifted = value
    return Magnitudes(query, key, value, lifted, largest)


def softmax_of(sequences: Sequences, scale: float, sizes: Magnitudes) -> Softmax:
    """The softmax of finite inputs, whose sizes are given."""
    hidden = sequences.hidden
    logit = sequences.scores(sequences.query * (scale * LOG2_E), sequences.key)
    products = sequences.scores(sizes.query, sizes.key)
    magnitude = np.abs(logit)
    blind: BoolArray | None = None
    if hidden is not None:
        np.copyto(logit, -np.inf, where=hidden)
        sees_none: BoolArray = np.asarray(hidden.all(axis=-1))
        blind = sees_none if sees_none.any() else None
    top = logit.argmax(axis=-1)
    peak = np.take_along_axis(logit, top[..., None], axis=-1)[..., 0]
    if blind is not None:
        peak[:, blind] = 0.0
    gap = logit - peak[..., None]
    weight = np.exp2(gap)
    np.negative(gap, out=gap)
    if hidden is not None:
        np.copyto(gap, 0.0, where=hidden)
    total = weight.sum(axis=-1)
    if blind is not None:
        total[:, blind] = 1.0
    weight /= total[..., None]
    return Softmax(hidden, blind, logit, magnitude, products, gap, float(gap.max()), top, peak, total, weight)
