"""Calibrated noise: a kernel's errors over their predicted standard deviation, pooled over a run.

A bound asks whether an error is possible; this asks whether the errors of a whole run look like rounding. It
sees what no bound can: rounding in the wrong direction, partial sums stored too narrowly, slow drift.

Model. Each rounding to nearest is independent, its error uniform over a spacing, significands log-uniform, so
its root mean square is ``KAPPA * u`` of the value. In 16-bit formats the output's rounding and P's dominate:

    sigma**2 = max((KAPPA u_o o)**2, eta_o**2 / 3) + (KAPPA u_p)**2 sum_j w_j**2 v_j**2

In float32 no rounding dominates: the order of every sum and the systematic error of the folded scale constant
matter as much, and an attempt to predict them gave chi from 0.2 to 1.7. There the gate alone judges.

It is meant for inputs whose roundings are independent: Gaussian values, varied logits. Data built so that
roundings agree (equal scores, values of one sign with P at one midpoint) breaks the model, not the kernel.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from references.arithmetic_model import ArithmeticModel
from references.rounding import Format, as_format

Float64Array = NDArray[np.float64]

# Root mean square of the relative rounding error over u. An error uniform over a spacing has mean square
# spacing**2 / 12; with significand s log-uniform on [1, 2) and spacing 2u, the mean of (2u/s)**2 / 12 is
# u**2 / 3 times the mean of s**-2, which is (1 - 1/4) / (2 ln 2).
KAPPA = math.sqrt(0.75 / (2 * math.log(2.0)) / 3)

# One rounding reaches |r| = 1 / KAPPA = 2.36, and m comparable ones 2.36 sqrt(m) only if all conspire; sums
# of many tend to a normal distribution, of which 6 standard deviations leave 2e-9.
LARGEST_R = 6.0
# chi of N independent outputs scatters by less than 0.75 / sqrt(N) of itself: 6 of these fit in 10 % for
# N >= 2048. A narrower format somewhere moves it by more than 15 % (docs/numerics.md, fault table).
CHI_MARGIN = 1.1
MIN_OUTPUTS = 2048
# The bias is self-normalised over rows: with symmetric errors P(|z| > 6) <= 2 exp(-18) = 3e-8, whatever their
# distribution (Efron 1969). |z| cannot exceed sqrt(rows), so fewer than 64 rows would not be a test.
LARGEST_Z = 6.0
MIN_ROWS = 64

BASELINES = Path(__file__).resolve().parent.parent / "fixtures" / "noise_baselines.json"


def predicted_sigma(
    query: Float64Array,
    key: Float64Array,
    value: Float64Array,
    visible: NDArray[np.bool_],
    *,
    scale: float,
    fmt: Format | str,
    model: ArithmeticModel,
) -> Float64Array:
    """Standard deviation of every output's error, [num_q_heads, q_len, head_dim].

    Args:
        query: [num_q_heads, q_len, head_dim]; key, value: [num_kv_heads, kv_len, head_dim].
        visible: [q_len, kv_len].
        scale: multiplies the logits.
        fmt: the input and output format.
        model: gives P's format.

    Raises:
        ValueError: float32, for which there is no model.
    """
    fmt = as_format(fmt)
    if fmt.precision >= model.work.precision:
        raise ValueError(f"fmt must be narrower than {model.work.name}, got {fmt.name}")
    group_size = len(query) // len(key)
    sigma = np.zeros(query.shape)
    for head, q in enumerate(query):
        k, v = key[head // group_size], value[head // group_size]
        logits = np.where(visible, scale * (q @ k.T), -np.inf)
        peak = np.max(logits, axis=1, keepdims=True, initial=-np.inf)
        weight = np.exp(logits - np.where(peak == -np.inf, 0.0, peak))
        total = weight.sum(axis=1, keepdims=True)
        weight /= np.where(total > 0, total, 1.0)
        mean = weight @ v

        rounding = KAPPA * fmt.unit_roundoff()
        variance = np.maximum((rounding * mean) ** 2, fmt.underflow_error() ** 2 / 3)
        p_format = model.format_of_p(fmt)
        if p_format.precision < model.work.precision:
            variance += (KAPPA * p_format.unit_roundoff()) ** 2 * (weight**2 @ v**2)
        sigma[head] = np.sqrt(np.where(total > 0, variance, 0.0))
    return sigma


@dataclass(frozen=True)
class NoiseStatistics:
    """What a pool says.

    Attributes:
        largest: max |r|; infinite if an output was not finite.
        chi: root mean square of r.
        bias: self-normalised mean of r * sign(out) over rows: a standard normal if errors are symmetric.
        outputs: how many were pooled.
        rows: queries they came from.
    """

    largest: float
    chi: float
    bias: float
    outputs: int
    rows: int

    def alarms(self, baseline_chi: float) -> list[str]:
        """Sentences for what is not rounding noise; empty if nothing is wrong.

        Raises:
            ValueError: nothing was pooled, which is not the same as nothing being wrong.
        """
        if self.outputs == 0:
            raise ValueError("outputs must be at least 1, got an empty pool")
        found = []
        if not self.largest <= LARGEST_R:
            found.append(f"largest |r| is {self.largest:.3g}, above {LARGEST_R:g}")
        if self.outputs >= MIN_OUTPUTS and not self.chi <= CHI_MARGIN * baseline_chi:
            found.append(f"chi is {self.chi:.3g}, above {CHI_MARGIN:g} x its baseline {baseline_chi:.3g}")
        if self.rows >= MIN_ROWS and not abs(self.bias) <= LARGEST_Z:
            found.append(f"bias z is {self.bias:+.3g}, beyond {LARGEST_Z:g}")
        return found


@dataclass
class NoisePool:
    """Running sums of r = (out - reference) / sigma; pools of several processes add up with `merge`."""

    largest: float = 0.0
    squares: float = 0.0
    outputs: int = 0
    row_bias: float = 0.0
    row_bias_squares: float = 0.0
    rows: int = field(default=0)

    def add(self, out: Float64Array, reference: Float64Array, sigma: Float64Array) -> None:
        """Pool outputs [..., head_dim]; a row is what shares all but the last index.

        Outputs whose sigma is 0 (queries that see no key) must be exact and are not counted.
        """
        if not out.shape == reference.shape == sigma.shape or out.ndim < 1:
            shapes = f"{out.shape}, {reference.shape}, {sigma.shape}"
            raise ValueError(f"out, reference and sigma must have one shape, got {shapes}")
        if not np.isfinite(reference).all() or not np.all(sigma >= 0):
            raise ValueError("reference must be finite and sigma not negative")
        error = out - reference
        counted = sigma > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.where(counted, error / sigma, np.where(error == 0, 0.0, np.inf))
        r = np.where(np.isnan(r), np.inf, r)
        self.largest = max(self.largest, float(np.abs(r).max(initial=0.0)))
        self.squares += float((r**2).sum())
        self.outputs += int(counted.sum())
        per_row = counted.sum(axis=-1)
        finite = np.clip(r, -1e6, 1e6) * np.sign(reference)
        bias = (finite.sum(axis=-1) / np.maximum(per_row, 1))[per_row > 0]
        self.row_bias += float(bias.sum())
        self.row_bias_squares += float((bias**2).sum())
        self.rows += bias.size

    def merge(self, other: NoisePool) -> None:
        """Add another pool's outputs to this one."""
        self.largest = max(self.largest, other.largest)
        self.squares += other.squares
        self.outputs += other.outputs
        self.row_bias += other.row_bias
        self.row_bias_squares += other.row_bias_squares
        self.rows += other.rows

    def statistics(self) -> NoiseStatistics:
        """The pool's figures so far."""
        spread = math.sqrt(self.row_bias_squares)
        return NoiseStatistics(
            largest=self.largest,
            chi=math.sqrt(self.squares / self.outputs) if self.outputs else 0.0,
            bias=self.row_bias / spread if spread > 0 else 0.0,
            outputs=self.outputs,
            rows=self.rows,
        )


def baseline_chi(model: str, fmt: str, kv_len: int) -> float:
    """The stored chi of a clean kernel on Gaussian inputs of about this length.

    Classes of lengths are bounded by the stored keys; the last one serves beyond them (chi tends to 1).
    Written by `python -m properties.numerics.noise_baselines`.
    """
    stored = json.loads(BASELINES.read_text())["chi"]
    if fmt not in stored.get(model, {}):
        raise ValueError(f"model and fmt must have a stored baseline ({BASELINES.name}), got {model}, {fmt}")
    classes = {int(longest): float(chi) for longest, chi in stored[model][fmt].items()}
    return classes[min((n for n in classes if n >= kv_len), default=max(classes))]
