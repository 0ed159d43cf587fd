"""What one sequence attends to, and which sequences are worked on together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.softmax import Sequences
from references.tiling import Tiles

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Elements of the arrays [rows, kv_len] of sequences that are worked on together.
TOGETHER = 1 << 16


@dataclass(frozen=True)
class Sequence:
    """What one sequence attends to.

    Attributes:
        query: [num_q_heads, q_len, head_dim], values of the input format.
        key: [num_kv_heads, kv_len, head_dim]
        value: [num_kv_heads, kv_len, head_dim]
        visible: [q_len, kv_len], which keys a query sees.
        tiles: the order in which the kernel visits the keys, see ``tiling``.
    """

    query: Float64Array
    key: Float64Array
    value: Float64Array
    visible: BoolArray
    tiles: Tiles

    def __post_init__(self) -> None:
        """Refuse a mask of another shape."""
        expected = (self.query.shape[1], self.key.shape[1])
        if self.visible.shape != expected:
            raise ValueError(f"visible must have the shape {expected}, got {self.visible.shape}")

    @property
    def has_pairs(self) -> bool:
        """Whether there is a query and a key."""
        return self.visible.size > 0


def batches(several: list[Sequence]) -> Iterator[list[int]]:
    """Places of sequences that are worked on together; those without a query or a key are left out."""
    waiting: list[int] = []
    rows = longest = 0
    for place, one in enumerate(several):
        if not one.has_pairs:
            continue
        its_rows, its_keys = one.query.shape[0] * one.query.shape[1], one.key.shape[1]
        if waiting and (rows + its_rows) * max(longest, its_keys) > TOGETHER:
            yield waiting
            waiting, rows, longest = [], 0, 0
        waiting.append(place)
        rows, longest = rows + its_rows, max(longest, its_keys)
    if waiting:
        yield waiting


def joined(several: list[Sequence]) -> Sequences:
    """Several sequences with the same heads and head_dim as one array each."""
    num_q_heads, _, head_dim = several[0].query.shape
    num_kv_heads = several[0].key.shape[0]
    group_size = num_q_heads // num_kv_heads
    queries = [one.query.reshape(num_kv_heads, -1, head_dim) for one in several]
    return Sequences(
        query=_concatenated(queries),
        key=_concatenated([one.key for one in several]),
        value=_concatenated([one.value for one in several]),
        rows=_spans(queries),
        keys=_spans([one.key for one in several]),
        visible=[one.visible if group_size == 1 else np.concatenate([one.visible] * group_size) for one in several],
    )


def _concatenated(arrays: list[Float64Array]) -> Float64Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)


def _spans(arrays: list[Float64Array]) -> list[slice]:
    ends = list(itertools.accumulate(x.shape[1] for x in arrays))
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
