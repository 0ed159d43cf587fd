"""Error of the kernel's operations: a declared model applied to one input format and one order of visit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from references.arithmetic_model import ArithmeticModel
from references.rounding import Format
from references.tiling import Path

Float64Array = NDArray[np.float64]


def gamma(count: NDArray[np.int64] | int, u: float) -> Float64Array:
    """Relative error of a product of ``count`` factors (1 + d) with abs(d) <= u, or their inverses."""
    total = np.maximum(np.asarray(count, dtype=np.float64), 0.0) * u
    return np.where(total < 1, total / np.where(total < 1, 1 - total, 1.0), np.inf)


def gamma_random(count: NDArray[np.int64] | int, u: float, confidence: float) -> Float64Array:
    """The same for mean-independent factors, except with probability 2 exp(-confidence**2 / 2)."""
    n = np.maximum(np.asarray(count, dtype=np.float64), 0.0)
    return np.minimum(gamma(count, u), np.expm1(confidence * np.sqrt(n) * u + n * u * u / (1 - u)))


def expm1_bound(x: Float64Array) -> Float64Array:
    """At least exp(x) - 1, for x >= 0; cheaper than expm1 where x is small."""
    if x.size and np.max(x) > 0.5:
        with np.errstate(over="ignore"):
            return np.expm1(x)
    return x * (1 + x)  # exp(x) <= 1 + x + x**2 up to 1.79


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

    @property
    def u(self) -> float:
        """Unit roundoff of the work format."""
        return self.model.work.unit_roundoff()

    @property
    def fused(self) -> bool:
        """Whether a tensor core sums the products; it takes no operand longer than tfloat32."""
        return self.model.accumulator == "fused" and (self.fmt.precision <= 11 or self.model.tf32)

    @property
    def products_per_step(self) -> int:
        """A tensor core takes half as many products of 32-bit operands."""
        return max(1, self.model.fused_products // (2 if self.fmt.width == 32 else 1))

    @property
    def floor(self) -> float:
        """Absolute error of one operation whose result underflows."""
        work = self.model.work
        flushed = self.model.flush_to_zero or self.fused
        return work.smallest_normal if flushed else work.smallest_subnormal

    @property
    def exp2_floor(self) -> float:
        """Absolute error of an exponential that underflows."""
        work = self.model.work
        if self.model.exp2_flushes:
            return work.smallest_normal
        return work.smallest_subnormal * max(1.0, self.model.exp2_error * 2.0 ** (work.precision - 1))

    @property
    def rounds_p(self) -> bool:
        """Whether P is narrower than the work format."""
        return self.model.format_of_p(self.fmt).precision < self.model.work.precision

    def gamma(self, count: NDArray[np.int64] | int) -> Float64Array:
        """Relative error of ``count`` roundings to nearest."""
        if self.confidence is None:
            return gamma(count, self.u)
        return gamma_random(count, self.u, self.confidence)

    def fused_steps(self, steps: NDArray[np.int64] | int) -> Float64Array:
        """Truncation is biased: its errors add up, also in the alarm."""
        return gamma(steps, self.model.fused_step_error())

    def with_operands(self, error: Float64Array, other_precision: int) -> Float64Array:
        """Add what happens to the operands and to their product before the summation."""
        if self.model.tf32 and self.fmt.width == 32:
            error = (1 + error) * (1 + 2.0**-10) ** 2 - 1
        elif not self.fused and self.fmt.precision + other_precision > self.model.work.precision:
            error = (1 + error) * (1 + self.u) - 1
        return error

    def score(self) -> float:
        """Error of q.k relative to sum abs(q_d k_d), (1)."""
        if self.fused:
            error = self.fused_steps(-(-self.head_dim // self.products_per_step))
        else:
            error = self.gamma(self.head_dim - 1)
        error = self.with_operands(error, self.fmt.precision)
        if self.model.scale_into_query:
            error = (1 + error) * (1 + self.fmt.unit_roundoff()) - 1
        return float(np.max(error))

    def accumulation(self, way: Path) -> Float64Array:
        """Error of P.V relative to sum abs(p_j v_j), the merge included, (4)."""
        if self.fused:
            steps = way.split_steps if self.model.carried else way.tile_steps
            error = self.fused_steps(steps)
            if not self.model.carried:
                error = (1 + error) * (1 + self.gamma(way.tiles - 1)) - 1
        elif self.model.carried:
            error = self.gamma(way.split_keys - 1)
        else:
            error = self.gamma(way.tile_keys + way.tiles - 2)
        error = self.with_operands(error, self.model.format_of_p(self.fmt).precision)
        return (1 + error) * (1 + self.rescaling(way)) - 1

    def row_sum(self, way: Path) -> Float64Array:
        """Error of the row sum relative to itself, (4)."""
        additions = np.minimum(way.tile_keys + way.tiles - 2, way.split_keys - 1)
        return (1 + self.gamma(additions)) * (1 + self.rescaling(way)) - 1

    def rescaling(self, way: Path) -> Float64Array:
        """Error of rescaling the accumulator or the row sum, and of adding up the splits."""
        merge_additions = np.maximum(way.splits - 1, 0)
        return self.gamma(way.rescales + way.merge_rescales + merge_additions)
