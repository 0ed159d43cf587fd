"""How much each key counts in the terms of a budget, and the sums over keys that follow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.alarm import Independent
from references.centred import Moments
from references.rounding_errors import Arithmetic, Error
from references.softmax import Sequences, Softmax, lifted_magnitude
from references.weight_errors import Deviations, p_rounding

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shares:
    """How much each key counts in the terms of a budget; [num_kv_heads, rows, kv_len], factors of the row left out.

    Attributes:
        of_values: powers, times 1 + phi where that is not in ``growth``, and the same times ``p_error`` if that is an
            array. They belong to magnitudes of values, and ``growth`` to them.
        of_distances: powers times phi, which belong to distances of values from the output, and ``part`` to them.
        growth, part: [num_kv_heads, rows]
        total: [num_kv_heads, rows] sums of ``of_distances``.
        p_error: of rounding P where numerator and denominator do not have it in common.
    """

    of_values: list[Float64Array]
    of_distances: Float64Array
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
    share = np.multiply(exact.power, linear, out=None if again else linear)
    return Shares(of_values, share, growth, slope / exact.total, np.add.reduce(share, axis=-1), p_error)


@dataclass(frozen=True)
class Sums:
    """Sums over keys of all that the terms need of the values, [num_kv_heads, rows, head_dim] unless said otherwise.

    Attributes:
        weighted: of v, with the powers.
        sizes: of abs(v), with each of ``Shares.of_values``.
        lifted: the same, subnormal values lifted where a tensor core lifts them.
        all_values: [num_kv_heads, sequences, head_dim] of abs(v), of all keys of a sequence.
        moments: of v and v**2, with ``Shares.of_distances``, and for the alarm also with ``Independent.common`` and
            ``Independent.square``.
        rounded: of v**2, with squares of the roundings of P; the alarm's, where these are independent.
    """

    weighted: Float64Array
    sizes: list[Float64Array]
    lifted: list[Float64Array]
    all_values: Float64Array
    moments: list[Moments]
    rounded: Float64Array | None = None


def sums_of(sequences: Sequences, exact: Softmax, shares: Shares, arithmetic: Arithmetic) -> Sums:
    """The sums of the gate; not finite where a value is not."""
    fmt, lifts = arithmetic.fmt, False

    def lifted(value: Float64Array, room: Float64Array) -> Float64Array:
        return lifted_magnitude(np.abs(value, out=room), fmt, True)

    if arithmetic.fused:
        lifts = any(
            ((size > 0) & (size < fmt.smallest_normal)).any()
            for size in (np.abs(sequences.value[piece.heads, piece.keys]) for piece in sequences.pieces)
        )
    (weighted, first), (*sizes, all_values), (second,), of_lifted = sequences.sums(
        (None, [exact.power, shares.of_distances]),
        (np.abs, [*shares.of_values, None]),
        (np.square, [shares.of_distances]),
        (lifted, [*shares.of_values] if lifts else []),
    )
    return Sums(weighted, sizes, of_lifted if lifts else sizes, all_values, [(first, second)])


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
