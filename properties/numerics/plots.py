"""The two plots of docs/numerics.md: error over budget against length, and what the budget consists of.

    python -m properties.numerics.plots

Gaussian inputs, head_dim 64, Hopper's simulated arithmetic, block_n 64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from properties.numerics.families import make
from properties.numerics.report import DOCS
from references.arithmetic_model import HOPPER
from references.attention import attention
from references.error_bounds import Budget, budget
from references.rounding import as_format
from references.simulator import simulate
from references.tiling import tiling

FORMATS = ("float16", "bfloat16", "float32")
LENGTHS = tuple(2**k for k in range(16))
IMAGES = DOCS / "images"


def measure(fmt: str, kv_len: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Budget]:
    """(error, reference, budget) of eight Gaussian queries."""
    problem = make(
        "gauss",
        num_kv_heads=1,
        rows=8,
        kv_len=kv_len,
        head_dim=64,
        fmt=as_format(fmt),
        is_causal=False,
        seed=1,
    )
    tensors = problem.query, problem.key, problem.value
    tiles = tiling(kv_len, 0, 64)
    out, _ = simulate(*tensors, problem.visible, scale=problem.scale, fmt=fmt, model=HOPPER, tiles=tiles)
    reference, _ = attention(*tensors, is_causal=False, scale=problem.scale)
    allowed = budget(*tensors, problem.visible, scale=problem.scale, fmt=fmt, model=HOPPER, tiles=tiles)
    return np.abs(out - reference), reference, allowed


def main() -> None:
    """Draw both plots into docs/images."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    measured = {fmt: [measure(fmt, n) for n in LENGTHS] for fmt in FORMATS}
    IMAGES.mkdir(parents=True, exist_ok=True)

    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for fmt, color in zip(FORMATS, ("C0", "C1", "C2"), strict=True):
        ratios = [error / allowed.out for error, _, allowed in measured[fmt]]
        axis.plot(LENGTHS, [r.max() for r in ratios], color=color, label=f"{fmt}, largest")
        axis.plot(LENGTHS, [np.median(r) for r in ratios], color=color, linestyle=":", label="median")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="keys", ylabel="error / budget", ylim=(1e-4, 2))
    axis.set_title("How much of the gate a correct kernel uses, N(0, 1)", fontsize=10)
    axis.legend(ncols=3, fontsize=7, loc="lower left")
    figure.savefig(IMAGES / "utilisation.png", dpi=90)

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True, layout="constrained")
    for axis, fmt in zip(axes, ("bfloat16", "float32"), strict=True):
        size = [np.abs(reference).mean() for _, reference, _ in measured[fmt]]
        for name in measured[fmt][0][2].terms:
            if name == "oracle":
                continue
            shares = [allowed.terms[name].mean() / s for (_, _, allowed), s in zip(measured[fmt], size, strict=True)]
            axis.plot(LENGTHS, shares, label=name)
        axis.set(xscale="log", yscale="log", xlabel="keys", title=fmt, ylim=(1e-9, 1))
    axes[0].set_ylabel("mean term / mean |out|")
    axes[0].legend(fontsize=7)
    figure.savefig(IMAGES / "budget_terms.png", dpi=90)


if __name__ == "__main__":
    main()
