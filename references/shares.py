"""How much each key counts in the terms of a budget, and the sums over keys that follow."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.alarm import Independent
from references.centred import Moments
from references.pieces import Make
from references.rounding_errors import Arithmetic, Error
from references.softmax import Sequences, Softmax, lifted_magnitude
from references.weight_errors import Deviations, p_rounding

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# What exponentials lose by underflow may be overestimated up to this share of what additions lose ...
UNDERFLOW_SHARE = 2.0**-80
# ... where a product with all values is to be saved: from so many keys on it takes time.
MANY_KEYS = 1024


@dataclass(frozen=True)
class Shares:
    """How much each key counts in the terms of a budget; [num_kv_heads, rows, kv_len], factors of the row left out.

    Attributes:
        of_values: powers, times 1 + phi where that is not in ``growth``, and the same times ``p_error`` if that is an
            array. They belong to magnitudes of values, and ``growth`` to them.
        of_distances: powers times phi, which belong to distances of values from the output, and ``part`` to them.
        stack: [num_kv_heads, 2 * rows, kv_len], the powers and below them ``of_distances``, if they are one array.
        growth, part: [num_kv_heads, rows]
        total: [num_kv_heads, rows] sums of ``of_distances``.
        p_error: of rounding P where numerator and denominator do not have it in common.
    """

    of_values: list[Float64Array]
    of_distances: Float64Array
    stack: Float64Array | None
    growth: Float64Array
    part: Float64Array
    total: Float64Array
    p_error: Error

    def rounded(self) -> tuple[Float64Array, Error]:
        """What the rounding of P is of each key, and its factor."""
        return self.of_values[-1], self.p_error if isinstance(self.p_error, float) else 1.0


def shares_of(exact: Softmax, deviations: Deviations, arithmetic: Arithmetic, gate: Shares | None = None) -> Shares:
    """The shares of the gate, which may overwrite the deviations, or of the alarm, given those of the gate.

    What the alarm has in common with the gate is the same object.
    """
    # 1 + phi of a key: of all its row, or where that is too much it is multiplied into the powers.
    power, linear, slope = exact.power, deviations.linear, deviations.slope
    growth = 1 + deviations.largest * (1 + 0.501 * deviations.largest)
    if gate is not None and gate.of_values[0] is power and deviations.wide is None:
        p_error, of_values = gate.p_error, gate.of_values
    else:
        p_error = p_rounding(exact, arithmetic)
        if arithmetic.model.row_sum_from_p:  # then the rounding of P is common to numerator and denominator
            linear = (1 + deviations.phi()) * (1 + p_error) - 1
            p_error, slope, growth = 0.0, np.ones_like(slope), np.ones_like(growth)
            power = power * (1 + linear)
        elif deviations.wide is not None:
            power = power.copy()
            power[deviations.wide] *= 1 + linear[deviations.wide]
            growth[deviations.wide] = 1.0
        of_values = [power] if isinstance(p_error, float) else [power, power * p_error]
    again = gate is not None or power is not exact.power
    stack, rows = None if again else exact.stack, exact.power.shape[1]
    share = np.multiply(exact.power, linear, out=None if again else linear if stack is None else stack[:, rows:])
    return Shares(of_values, share, stack, growth, slope / exact.total, np.add.reduce(share, axis=-1), p_error)


@dataclass(frozen=True)
class Sums:
    """Sums over keys of all that the terms need of the values, [num_kv_heads, rows, head_dim] unless said otherwise.

    Attributes:
        weighted: of v, with the powers.
        sizes: of abs(v), with each of ``Shares.of_values``.
        lifted: the same, subnormal values lifted where a tensor core lifts them.
        spread: [num_kv_heads, rows], see ``_spread``; None: all zeros.
        all_values: [num_kv_heads, sequences, head_dim] of abs(v), of all keys of a sequence; None: no spread is 0.
        largest_sum: at least the largest of these sums; not finite where a value is not.
        largest_value: at least the largest abs(v).
        moments: of v and v**2, with ``Shares.of_distances``, and for the alarm also with ``Independent.common`` and
            ``Independent.square``.
        rounded: of v**2, with squares of the roundings of P; the alarm's, where these are independent.
    """

    weighted: Float64Array
    sizes: list[Float64Array]
    lifted: list[Float64Array]
    spread: Float64Array | None
    all_values: Float64Array | None
    largest_sum: float
    largest_value: float
    moments: list[Moments]
    rounded: Float64Array | None = None

    def of_all(self, sequences: Sequences, factor: Float64Array) -> Float64Array:
        """At least the sums of abs(v) over all keys of a sequence, times a factor of the row."""
        if self.spread is None:
            assert self.all_values is not None
            return sequences.times(self.all_values, factor)
        result = self.sizes[0] * (self.spread * factor)[..., None]
        if self.all_values is not None:
            np.copyto(result, sequences.times(self.all_values, factor), where=self.spread[..., None] == 0)
        return result


def _spread(sequences: Sequences, exact: Softmax, shares: Shares, arithmetic: Arithmetic) -> Float64Array | None:
    """The largest over the smallest power of rows that see all of many keys, [num_kv_heads, rows].

    Times the sum of abs(v) with the first of ``Shares.of_values`` it is at least the sum over all keys. 0 in other
    rows, and where that would be too much; None: all zeros.
    """
    if sequences.kv_len < MANY_KEYS:
        return None
    many: bool | BoolArray = True
    if len(sequences.rows) > 1 or sequences.hidden is not None:
        _, rows, _, keys = sequences.sizes
        many = np.concatenate([visible.all(axis=-1) for visible in sequences.visible])
        many &= np.repeat(keys >= MANY_KEYS, rows)
    limit = math.log2(UNDERFLOW_SHARE * arithmetic.u / arithmetic.exp2_floor)
    # Where growth is 1, the first shares hold 1 + phi, which may overflow.
    narrow = (exact.widest <= limit) & (shares.growth > 1) & many
    return np.where(narrow, np.exp2(np.minimum(exact.widest, limit)), 0.0)


def sums_of(sequences: Sequences, exact: Softmax, shares: Shares, arithmetic: Arithmetic) -> Sums:
    """The sums of the gate; not finite where a value is not."""
    fmt, lifts = arithmetic.fmt, False

    def lifted(value: Float64Array, room: Float64Array) -> Float64Array:
        return lifted_magnitude(np.abs(value, out=room), fmt, True)

    def squared(_: Float64Array, magnitudes: Float64Array) -> Float64Array:
        """Of the same values, whose magnitudes are still in their room: they are nearer than the values."""
        return np.square(magnitudes, out=magnitudes)

    if arithmetic.fused:
        lifts = any(
            ((size > 0) & (size < fmt.smallest_normal)).any()
            for size in (np.abs(sequences.value[piece.keys]) for piece in sequences.pieces)
        )
    spread = _spread(sequences, exact, shares, arithmetic)
    saved = spread is not None and bool(spread.all())
    wanted: list[tuple[Make | None, list[Float64Array | None]]] = [
        (np.abs, [*shares.of_values] if saved else [*shares.of_values, None]),
        (squared, [shares.of_distances]),
        (None, [exact.power, shares.of_distances] if shares.stack is None else [shares.stack]),
    ]
    if lifts:
        wanted.append((lifted, [*shares.of_values]))
    sizes, (second,), linear, *of_lifted = sequences.sums(*wanted)
    rows = exact.power.shape[1]
    weighted, first = linear if shares.stack is None else (linear[0][:, :rows], linear[0][:, rows:])
    if spread is not None and saved:
        all_values, largest_sum = None, float((sizes[0].max(axis=-1) * spread).max())
        with np.errstate(divide="ignore"):
            largest_value = math.sqrt((second.max(axis=-1) / shares.of_distances.min(axis=-1)).max())
    else:
        all_values = sizes.pop()
        largest_sum = largest_value = float(all_values.max())
    return Sums(
        weighted=weighted,
        sizes=sizes,
        lifted=of_lifted[0] if lifts else sizes,
        spread=spread,
        all_values=all_values,
        largest_sum=largest_sum,
        largest_value=largest_value,
        moments=[(first, second)],
    )


def sums_of_alarm(
    sequences: Sequences,
    exact: Softmax,
    shares: Shares,
    independent: Independent,
    arithmetic: Arithmetic,
    gate: tuple[Shares, Sums],
) -> Sums:
    """The sums of the alarm; those that it has in common with the gate are not taken again."""
    of_gate, sums = gate
    if shares.of_values is not of_gate.of_values:
        sums = sums_of(sequences, exact, shares, arithmetic)
    weights: list[Float64Array | None] = [shares.of_distances, independent.common, independent.square]
    rounded: list[Float64Array | None] = []
    if arithmetic.rounds_p and arithmetic.model.p_rounding == "nearest":
        rounded.append(np.square(shares.rounded()[0]))
    first, second = sequences.sums((None, weights), (np.square, [*weights, *rounded]))
    moments = list(zip(first, second[:3], strict=True))
    return dataclasses.replace(sums, moments=moments, rounded=second[3] if rounded else None)
