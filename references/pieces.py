"""Pieces of keys and values that stay in a cache with what is made of them, and sums over them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

# Numbers of keys or values that are worked on at once, so that what is made of them stays in a cache.
NUMBERS_AT_ONCE = 1 << 16
# Numbers of a cache line.
CACHE_LINE = 8

# Of some rows of an array [..., rows, columns].
Index = tuple[EllipsisType, slice, slice]


class Part(NamedTuple):
    """Keys of one sequence in a piece.

    Attributes:
        sequence: which.
        keys: where they are in [..., keys of the piece, head_dim].
        columns: the same counted in the sequence.
        rows: where the rows of the sequence are in [..., rows, head_dim].
        scores: where rows and keys are in [..., rows, kv_len].
    """

    sequence: int
    keys: Index
    columns: slice
    rows: Index
    scores: Index


class Piece(NamedTuple):
    """Keys that are worked on at once.

    Attributes:
        keys: where they are in [..., keys, head_dim].
        room: for what is made of them.
        parts: of the sequences that they belong to.
    """

    keys: Index
    room: Float64Array
    parts: list[Part]


# Makes an array of another one and of room for it: a function of NumPy and its argument ``out``.
Make = Callable[[Float64Array, Float64Array], Float64Array]


def on_cache_line(shape: tuple[int, ...]) -> Float64Array:
    """A new array that begins with a cache line: products of it are up to a third faster."""
    size = math.prod(shape)
    numbers = np.empty(size + CACHE_LINE)
    return numbers[-numbers.ctypes.data // numbers.itemsize % CACHE_LINE :][:size].reshape(shape)


def scores_of_few(
    key: Float64Array, pieces: list[Piece], wanted: Iterable[tuple[Float64Array, Make | None]]
) -> list[Float64Array]:
    """``Sequences.scores`` of few rows of one sequence of many keys, which is all of every piece.

    Those of a head are turned over when all of its keys are done: piece by piece it takes longer.
    """
    several = [(make, np.ascontiguousarray(query.mT)) for query, make in wanted]
    num_kv_heads, kv_len, _ = key.shape
    results = [np.empty((num_kv_heads, query.shape[-1], kv_len)) for _, query in several]
    turned = [np.empty((kv_len, query.shape[-1])) for _, query in several]
    places = [(piece.parts[0].columns, piece.room) for piece in pieces]
    for head, its_keys in enumerate(key):
        asked = [(make, query[head], scores) for (make, query), scores in zip(several, turned, strict=True)]
        for keys, room in places:
            some_keys = its_keys[keys]
            for make, query, scores in asked:
                np.matmul(some_keys if make is None else make(some_keys, room), query, out=scores[keys])
        for result, scores in zip(results, turned, strict=True):
            result[head] = scores.T
    return results


def sums_of_one(
    value: Float64Array, pieces: list[Piece], wanted: Iterable[tuple[Make | None, list[Float64Array | None]]]
) -> list[list[Float64Array]]:
    """``Sequences.sums`` of one sequence of many keys. The sums of a piece are one array, and added up at once."""
    num_kv_heads, kv_len, head_dim = value.shape
    ones = np.ones((num_kv_heads, 1, kv_len))
    several = [(make, [ones if weight is None else weight for weight in weights]) for make, weights in wanted]
    ends = list(itertools.accumulate((weight.shape[1] for _, weights in several for weight in weights), initial=0))
    of_weights = list(itertools.starmap(slice, itertools.pairwise(ends)))
    of_piece, total = np.empty((ends[-1], head_dim)), np.zeros((num_kv_heads, ends[-1], head_dim))
    places = [(piece.parts[0].columns, piece.room) for piece in pieces]
    for head, its_values in enumerate(value):
        outs = iter([of_piece[rows] for rows in of_weights])
        asked = [(make, [(weight[head], next(outs)) for weight in weights]) for make, weights in several]
        its_total = total[head]
        for keys, room in places:
            some_values = its_values[keys]
            for make, pairs in asked:
                made = some_values if make is None else make(some_values, room)
                for weight, out in pairs:
                    np.matmul(weight[:, keys], made, out=out)
            its_total += of_piece
    found = iter([np.ascontiguousarray(total[:, rows]) for rows in of_weights])
    return [[next(found) for _ in weights] for _, weights in several]
