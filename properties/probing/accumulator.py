"""Identify how a matrix unit accumulates, from test vectors, through any dot product.

Each test is one dot product of numbers that are powers of two, so that only the accumulation can round. The
questions, for a fused unit of K products, F fractional bits (see `references.accumulators`):

    together   L - L + s with s far below L: s is lost if it is aligned with L in one step, and survives if it
               comes in another. Which positions lose it says K.
    F          1 - 1 + 2**-f in one step: survives up to f = F.
    width      1 + 2**-f: survives up to f = fraction bits of the accumulator.
    rounding   1 + 3 * 2**-24 in one step: 1 + 2**-23 if cut off, 1 + 2**-22 if rounded to nearest even.
    carried    C = 1 and 2**-24 in each of two steps: stays 1 if C is carried through the steps, and becomes
               1 + 2**-23 if the dot product is added to C afterwards.

An answer is only a conjecture; `agreement` then compares the model with the unit bit for bit on random data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.accumulators import tensor_core_dot
from references.rounding import Format, round_to

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]

# (a [16, KMAX], b [KMAX, 16], c [16, 16]) -> float32 [16, 16]; arguments hold values of the unit's formats.
Unit = Callable[[Float64Array, Float64Array, Float64Array], Float32Array]

KMAX = 64
TESTS = 16  # independent tests in one call: test i is row i by column i
LARGE, SMALL = 28, -14  # exponents 42 apart, further than any known accumulator is wide
MOST_BITS = 40


@dataclass(frozen=True)
class Accumulator:
    """What the tests say about one unit.

    Attributes:
        fused_products: K; 1 if nothing is fused.
        fused_fraction_bits: F; `MOST_BITS` if nothing is lost by alignment.
        contiguous: whether the products of the first step are the first K.
        result_fraction_bits: fraction bits of the accumulator, 23 for float32.
        rounding: of the sum of a step; "not seen" where the terms are cut before they are summed, and in a
            chain of additions, which rounds each.
        carried: whether C goes through the steps.
    """

    fused_products: int
    fused_fraction_bits: int
    contiguous: bool
    result_fraction_bits: int
    rounding: str
    carried: bool

    @property
    def fused(self) -> bool:
        """A tensor core, as opposed to a chain or tree of IEEE additions."""
        return self.fused_products > 2 and self.fused_fraction_bits < MOST_BITS


Terms = dict[int, tuple[int, int]]  # position -> (sign, exponent)


def _run(unit: Unit, tests: list[Terms], c: float = 0.0) -> list[float]:
    """The results of any number of tests, sixteen a call."""
    results: list[float] = []
    for start in range(0, len(tests), TESTS):
        a, b = np.zeros((TESTS, KMAX)), np.zeros((KMAX, TESTS))
        for i, terms in enumerate(tests[start : start + TESTS]):
            for position, (sign, exponent) in terms.items():
                # Both factors stay normal in float16 for products down to 2**-28.
                a[i, position] = sign * 2.0 ** (exponent // 2)
                b[position, i] = 2.0 ** (exponent - exponent // 2)
        diagonal = np.diagonal(unit(a, b, np.full((TESTS, TESTS), c)))
        results += [float(x) for x in diagonal[: len(tests) - start]]
    return results


def _first_step(unit: Unit) -> list[int]:
    """Positions of the products that are summed in one step with position 0, in the order 0, 1, ...

    Supposes that 0 and 1 share the first step, or that nothing is fused: a chain of additions loses nothing
    between L and -L, so its step is position 0 alone. Where the supposition fails, `agreement` shows it.
    """
    others = range(2, KMAX)
    results = _run(unit, [{0: (1, LARGE), 1: (-1, LARGE), j: (1, SMALL)} for j in others])
    lost = [j for j, x in zip(others, results, strict=True) if x == 0.0]
    return [0, 1, *lost] if lost else [0]


def identify(unit: Unit) -> Accumulator:
    """Ask the unit all the questions of the module's docstring."""
    step = _first_step(unit)
    rest = [j for j in range(KMAX) if j not in step]
    zeroth, first, second, third = (step + rest)[:4]

    exponents = range(1, 29)
    alone = _run(unit, [{zeroth: (1, 0), first: (-1, 0), second: (1, -f)} for f in exponents])
    fraction = max((f for f, x in zip(exponents, alone, strict=True) if x == 2.0**-f), default=0)
    if fraction == exponents[-1]:
        fraction = MOST_BITS

    sums = _run(unit, [{zeroth: (1, 0), first: (1, -f)} for f in exponents])
    width = max((f for f, x in zip(exponents, sums, strict=True) if x == 1 + 2.0**-f), default=0)

    half = (1, -24)
    (three,) = _run(unit, [{zeroth: (1, 0), first: half, second: half, third: half}])
    names = {1 + 2.0**-23: "toward zero", 1 + 2.0**-22: "nearest even"}

    (carried,) = _run(unit, [{zeroth: half, rest[-1]: half}], c=1.0)
    return Accumulator(
        fused_products=len(step),
        fused_fraction_bits=fraction,
        contiguous=sorted(step) == list(range(len(step))),
        result_fraction_bits=width,
        rounding=names.get(three, "not seen"),
        carried=carried == 1.0,
    )


def random_operands(fmt: Format, seed: int) -> tuple[Float64Array, Float64Array, Float64Array]:
    """a, b and c with exponents spread over 16 octaves and random signs: every alignment occurs."""
    rng = np.random.default_rng([seed, fmt.precision])

    def draw(shape: tuple[int, int]) -> Float64Array:
        return round_to(rng.standard_normal(shape) * np.exp2(rng.integers(-8, 8, shape)), fmt)

    c = rng.standard_normal((TESTS, TESTS)) * np.exp2(rng.integers(-8, 16, (TESTS, TESTS)))
    return draw((TESTS, KMAX)), draw((KMAX, TESTS)), c.astype(np.float32).astype(np.float64)


def agreement(unit: Unit, found: Accumulator, fmt: Format, *, calls: int = 40) -> float:
    """Share of random dot products whose bits the conjectured fused model reproduces; nan if not fused.

    Every call compares 16 x 16 dot products of `KMAX` terms and a C.
    """
    if not found.fused:
        return math.nan
    same = 0
    for seed in range(calls):
        a, b, c = random_operands(fmt, seed)
        through = c.astype(np.float32) if found.carried else np.zeros((TESTS, TESTS), np.float32)
        expected = tensor_core_dot(
            a,
            b,
            through,
            terms=found.fused_products,
            fraction_bits=found.fused_fraction_bits,
            smallest_normal=fmt.smallest_normal,
        )
        if not found.carried:
            expected = c.astype(np.float32) + expected
        same += int((unit(a, b, c) == expected).sum())
    return same / (calls * TESTS * TESTS)
