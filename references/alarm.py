"""Errors that are independent from key to key, added as the root of their squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from references.softmax import LN_2, Sequences, Softmax
from references.weight_errors import Deviations

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]

# Numbers held at once while contributions of keys are added up.
CHUNK = 1 << 16


@dataclass(frozen=True)
class Independent:
    """What the errors of the weights of a softmax consist of; [num_kv_heads, rows, kv_len].

    Attributes:
        own: w phi less what is common: from the score of the key itself.
        common: w times one function of the gap.
        square: of ``own``.
        common_mass, square_mass: [num_kv_heads, rows], their sums.
        second_order: [num_kv_heads, rows], sums of w phi**2.
    """

    own: Float64Array
    common: Float64Array
    square: Float64Array
    common_mass: Float64Array
    square_mass: Float64Array
    second_order: Float64Array


def independent_of(exact: Softmax, deviations: Deviations) -> Independent:
    """The parts of the error; ``deviations`` must be those of the alarm."""
    assert deviations.shared is not None
    weight, phi = exact.weight(), deviations.phi()
    common = weight * deviations.shared
    own = np.multiply(weight, phi, out=weight)
    second_order = np.einsum("hrk,hrk->hr", own, phi)
    own -= common
    square = np.square(own, out=phi)
    return Independent(own, common, square, common.sum(axis=-1), square.sum(axis=-1), second_order)


@dataclass(frozen=True)
class Groups:
    """Groups of keys that err alike, each of a row; places beyond the last key of a group repeat its first one."""

    head: IntArray  # [groups, 1]
    row: IntArray  # [groups, 1]
    keys: IntArray  # [groups, places]
    inside: BoolArray  # [groups, places]

    def of(self, of_keys: Float64Array) -> Float64Array:
        """[num_kv_heads, rows, kv_len] to [groups, 1, places]; 0 beyond the last key."""
        mine = of_keys[self.head, self.row, self.keys]
        mine *= self.inside
        return mine[:, None]


class Alike:
    """Keys of a row that err alike: their contributions are added before they are squared.

    Sums of squares are cheap, and few keys err alike. So what is asked for is the excess: how much more the squares of
    the groups of a row are than the squares of its keys.
    """

    def __init__(self, sequences: Sequences, exact: Softmax, slack: Float64Array) -> None:
        """Take the values, and the gaps of their weights.

        Args:
            sequences: the inputs.
            exact: their softmax.
            slack: [num_kv_heads, rows], by how much gaps of keys with equal logits may differ, see ``slack_of``.
        """
        self.sequences = sequences
        self.slack = slack[..., None]
        self.gap = -exact.gap
        if exact.hidden is not None:
            np.copyto(self.gap, np.inf, where=exact.hidden)

    @cached_property
    def tied(self) -> BoolArray:
        """[num_kv_heads, rows]: which have equal logits, whose scores err alike."""
        return np.asarray(_like_before(np.sort(self.gap, axis=-1), self.slack).any(axis=-1))

    def excess(
        self,
        of_keys: Float64Array,
        rows: BoolArray,
        p_error: float | None = None,
        centre: Float64Array | None = None,
        more_than: float = 0.0,
    ) -> Float64Array:
        """The excess where the contribution of a key is s_j abs(v_j - centre).

        Args:
            of_keys: s_j, [num_kv_heads, rows, kv_len].
            rows: [num_kv_heads, rows], for which it is wanted.
            p_error: None: keys with equal logits err alike. Else the relative error of rounding P: weights that agree
                to a quarter of it round alike, too.
            centre: [num_kv_heads, rows, head_dim]; None: zeros.
            more_than: so many groups, single keys included, a row must have, else infinity is returned.

        Returns:
            [num_kv_heads, rows, head_dim]; 0 in other rows.
        """
        head_dim = self.sequences.value.shape[-1]
        values = self.sequences.value.reshape(-1, head_dim)
        first_key, num_keys = self.sequences.first_key, self.sequences.value.shape[1]

        def sizes(groups: Groups) -> Float64Array:
            found: Float64Array = values[groups.head * num_keys + first_key[groups.row] + groups.keys]
            if centre is not None:
                found -= centre[groups.head, groups.row]
            return np.abs(found, out=found)

        result = np.zeros((*rows.shape, head_dim))
        self._add_excess(result, of_keys, sizes, rows, p_error, more_than)
        return result

    def excess_of_sums(self, of_keys: Float64Array, rows: BoolArray, more_than: float) -> Float64Array:
        """The excess of s_j alone where keys with equal logits err alike, [num_kv_heads, rows]."""
        result = np.zeros((*rows.shape, 1))
        self._add_excess(result, of_keys, lambda groups: np.ones((*groups.keys.shape, 1)), rows, None, more_than)
        return result[..., 0]

    def _add_excess(
        self,
        result: Float64Array,
        of_keys: Float64Array,
        sizes: Callable[[Groups], Float64Array],
        rows: BoolArray,
        p_error: float | None,
        more_than: float,
    ) -> None:
        """Put the excess into an array of zeros, for contributions s_j times ``sizes`` [groups, places, columns]."""
        head, row = np.nonzero(rows)
        labels = self.gap[head, row]  # [rows wanted, kv_len]
        order = np.argsort(labels, axis=-1)
        labels = np.take_along_axis(labels, order, axis=-1)
        like = _like_before(labels, self.slack[head, row])
        if p_error is not None:
            like |= _like_before(np.floor(labels * (4 * LN_2 / p_error)))
        many = np.count_nonzero(labels < np.inf, axis=-1) - np.count_nonzero(like, axis=-1) > more_than
        result[head[~many], row[~many]] = np.inf
        for groups in _groups(head[many], row[many], order[many], like[many], result.shape[-1]):
            share, size = groups.of(of_keys), sizes(groups)
            excess = (share @ size)[:, 0]
            excess *= excess
            np.square(share, out=share)
            np.square(size, out=size)
            excess -= (share @ size)[:, 0]
            place = groups.head[:, 0] * result.shape[1] + groups.row[:, 0]
            last = np.flatnonzero(place[1:] != place[:-1])  # of each row but the last
            begins = np.concatenate(([0], last + 1))
            result.reshape(-1, result.shape[-1])[place[begins]] += np.add.reduceat(excess, begins, axis=0)


def slack_of(exact: Softmax, of_products: Float64Array, factor: float, head_dim: int) -> Float64Array:
    """By how much the gaps of equal keys may differ, [num_kv_heads, rows].

    A sum of head_dim products in float64 is off by head_dim u times the sum of magnitudes, wherever and in whatever
    order BLAS adds it up, and equal keys do get different last bits; the factor and the difference round as well.

    Args:
        exact: the softmax.
        of_products: [num_kv_heads, rows, kv_len], sums of magnitudes.
        factor: of logits in base 2 over scores.
        head_dim: products of a sum.
    """
    seen = True if exact.hidden is None else ~exact.hidden
    largest = np.max(of_products, axis=-1, initial=0.0, where=seen)
    return np.asarray(largest * (abs(factor) * (head_dim + 4) * 2.0**-52))


def _like_before(labels: Float64Array, slack: Float64Array | float = 0.0) -> BoolArray:
    """[..., n - 1]: whether a label is near the one before it; hidden keys have infinite ones and are like nothing."""
    return np.asarray((labels[..., 1:] <= labels[..., :-1] + slack) & (labels[..., 1:] < np.inf))


def _groups(head: IntArray, row: IntArray, order: IntArray, like: BoolArray, columns: int) -> Iterator[Groups]:
    """Groups of more than one key of some rows, those of about the same size together.

    Args:
        head, row: [rows wanted]
        order: [rows wanted, kv_len] of the keys of each.
        like: [rows wanted, kv_len - 1], see ``_like_before``.
        columns: numbers to be held for each key.
    """
    # Nothing is before the first key of a row, and nothing after the last is like it.
    bounded = np.zeros((len(like), like.shape[1] + 2), dtype=np.bool_)
    bounded[:, 1:-1] = like
    first = np.flatnonzero(bounded[:, 1:] > bounded[:, :-1])
    size = np.flatnonzero(bounded[:, 1:] < bounded[:, :-1]) - first + 1
    its = first // order.shape[-1]
    # Sizes of two significant bits, so that there are few.
    unit = 1 << np.maximum(np.frexp(size)[1] - 2, 0)
    rounded = -(-size // unit) * unit
    for most in np.unique(rounded):
        places = np.arange(most)
        mine = np.flatnonzero(rounded == most)
        step = max(1, CHUNK // (len(places) * columns))
        for some in (mine[i : i + step] for i in range(0, len(mine), step)):
            inside = places < size[some, None]
            keys = order.reshape(-1)[first[some, None] + places * inside]
            yield Groups(head[its[some], None], row[its[some], None], keys, inside)
