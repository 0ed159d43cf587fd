"""Error of the kernel's operations: a declared model applied to one input format and one order of visit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from references.arithmetic_model import ArithmeticModel
from references.rounding import Format
from references.tiling import Count, Counts, Path

Float64Array = NDArray[np.float64]
# Of every row, or one number for all of them.
Error = NDArray[np.floating[Any]] | float


def gamma(count: Count, u: float) -> Error:
    """Relative error of a product of ``count`` factors (1 + d) with abs(d) <= u, or their inverses."""
    if isinstance(count, int):
        factors = max(count, 0) * u
        return factors / (1 - factors) if factors < 1 else math.inf
    total = np.maximum(count, 0) * u
    if total.max(initial=0.0) < 1:
        bound: Float64Array = total / (1 - total)
        return bound
    return np.where(total < 1, total / np.where(total < 1, 1 - total, 1.0), np.inf)


def gamma_random(count: Count, u: float, confidence: float) -> Error:
    """The same for mean-independent factors, except with probability 2 exp(-confidence**2 / 2)."""
    n = np.maximum(count, 0)
    likely: Float64Array = np.expm1(confidence * np.sqrt(n) * u + n * (u * u / (1 - u)))
    return np.minimum(gamma(count, u), likely)


@dataclass(frozen=True)
class Arithmetic:
    """A model applied to one input format.

    Attributes:
        model: the arithmetic of the kernel.
        fmt: format of the inputs.
        head_dim: length of the dot product of a score.
        confidence: None: worst cases. A number: roundings to nearest add up like random ones, except with
            probability 2 exp(-confidence**2 / 2).
    """

    model: ArithmeticModel
    fmt: Format
    head_dim: int
    confidence: float | None

    @cached_property
    def u(self) -> float:
        """Unit roundoff of the work format."""
        return self.model.work.unit_roundoff()

    @cached_property
    def fused(self) -> bool:
        """Whether a tensor core sums the products; it takes no operand longer than tfloat32."""
        return self.model.accumulator == "fused" and (self.fmt.precision <= 11 or self.model.tf32)

    @cached_property
    def products_per_step(self) -> int:
        """A tensor core takes half as many products of 32-bit operands."""
        return max(1, self.model.fused_products // (2 if self.fmt.width == 32 else 1))

    @cached_property
    def floor(self) -> float:
        """Absolute error of one operation whose result underflows."""
        work = self.model.work
        flushed = self.model.flush_to_zero or self.fused
        return work.smallest_normal if flushed else work.smallest_subnormal

    @cached_property
    def exp2_floor(self) -> float:
        """Absolute error of an exponential that underflows."""
        work = self.model.work
        if self.model.exp2_flushes:
            return work.smallest_normal
        return work.smallest_subnormal * max(1.0, self.model.exp2_error * 2.0 ** (work.precision - 1))

    @cached_property
    def rounds_p(self) -> bool:
        """Whether P is narrower than the work format."""
        return self.p_format.precision < self.model.work.precision

    def gamma(self, count: Count) -> Error:
        """Relative error of ``count`` roundings to nearest."""
        if self.confidence is None:
            return gamma(count, self.u)
        return gamma_random(count, self.u, self.confidence)

    def fused_steps(self, steps: Count) -> Error:
        """Truncation is biased: its errors add up, also in the alarm."""
        return gamma(steps, self.fused_step)

    @cached_property
    def fused_step(self) -> float:
        """Error of one fused step relative to the sum of the magnitudes it adds up."""
        return self.model.fused_step_error()

    def with_operands(self, error: Error, other_precision: int) -> Error:
        """Add what happens to the operands and to their product before the summation."""
        if self.model.tf32 and self.fmt.width == 32:
            error = (1 + error) * (1 + 2.0**-10) ** 2 - 1
        elif not self.fused and self.fmt.precision + other_precision > self.model.work.precision:
            error = (1 + error) * (1 + self.u) - 1
        return error

    @cached_property
    def score(self) -> float:
        """Error of q.k relative to sum abs(q_d k_d), (1)."""
        if self.fused:
            error = self.fused_steps(-(-self.head_dim // self.products_per_step))
        else:
            error = self.gamma(self.head_dim - 1)
        error = self.with_operands(error, self.fmt.precision)
        if self.model.scale_into_query:
            error = (1 + error) * (1 + self.fmt.unit_roundoff()) - 1
        return float(error)

    @cached_property
    def p_format(self) -> Format:
        """P's format."""
        return self.model.format_of_p(self.fmt)

    def accumulation(self, seen: Counts, rescaling: Error) -> Error:
        """Error of P.V relative to sum abs(p_j v_j), the merge included, (4)."""
        if self.fused:
            error = self.fused_steps(seen.split_steps if self.model.carried else seen.tile_steps)
            if not self.model.carried:
                error = (1 + error) * (1 + self.gamma(seen.tiles - 1)) - 1
        elif self.model.carried:
            error = self.gamma(seen.split_keys - 1)
        else:
            error = self.gamma(seen.tile_keys + seen.tiles - 2)
        error = self.with_operands(error, self.p_format.precision)
        return (1 + error) * (1 + rescaling) - 1

    def row_sum(self, seen: Counts, rescaling: Error) -> Error:
        """Error of the row sum relative to itself, (4)."""
        return (1 + self.gamma(seen.sum_additions)) * (1 + rescaling) - 1

    def rescaling(self, seen: Counts, way: Path) -> Error:
        """Error of rescaling the accumulator or the row sum, and of adding up the splits."""
        return self.gamma(way.rescales + way.merge_rescales + seen.merge_additions)

    def lost_by_operations(self, seen: Counts) -> Error:
        """(5) What products, additions and rescalings that underflow can lose of a numerator or of the row sum."""
        return (2 * seen.keys + 4 * seen.tiles * seen.splits + 2) * self.floor

    def lost_sum(self, seen: Counts) -> Error:
        """(5) What underflow can lose of the row sum, exponentials included."""
        return 2 * self.exp2_floor * seen.keys + self.lost_by_operations(seen)

    @cached_property
    def partial(self) -> float:
        """(8) Relative error of a normalised partial output each time it is stored."""
        rounding = self.partial_format.unit_roundoff() if self.narrows_partials else 0.0
        return ((1 + self.model.division_error) * (1 + rounding)) ** self.model.stores_of_lse - 1

    @cached_property
    def partial_floor(self) -> float:
        """(8) What the subnormal numbers of a narrower format add to it."""
        return self.model.stores_of_lse * self.partial_format.underflow_error() if self.narrows_partials else 0.0

    @cached_property
    def partial_format(self) -> Format:
        """The format of stored partial outputs."""
        return self.model.format_of_partials(self.fmt)

    @cached_property
    def narrows_partials(self) -> bool:
        """Whether they are rounded when they are stored."""
        return self.partial_format.precision < self.model.work.precision


@lru_cache(maxsize=256)
def arithmetic_of(model: ArithmeticModel, fmt: Format, head_dim: int, confidence: float | None = None) -> Arithmetic:
    """The same object for the same arguments, so that what follows from them is computed once."""
    return Arithmetic(model, fmt, head_dim, confidence)
