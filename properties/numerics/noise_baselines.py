"""Measure chi of clean simulated kernels on Gaussian inputs and store it in fixtures/noise_baselines.json.

    python -m properties.numerics.noise_baselines

The inputs are Gaussian with head_dim 64; the kernels are the interpreter's, Ampere's, Hopper's and Blackwell's
simulated arithmetic. chi differs from 1 because roundings are not exactly independent and uniform; in 16-bit
formats it grows from 0.89 to 0.95 with the length. What matters is that it is stable within a class of lengths, so
that a growth of 10 % is a fault and not chance.
"""

from __future__ import annotations

import json

import numpy as np

from properties.numerics.families import make
from references.arithmetic_model import AMPERE, BLACKWELL, HOPPER, INTERPRETER, ArithmeticModel
from references.attention import attention
from references.noise import BASELINES, NoisePool, NoiseStatistics, predicted_sigma
from references.rounding import as_format
from references.simulator import Fault, simulate
from references.tiling import tiling

MODELS = (INTERPRETER, AMPERE, HOPPER, BLACKWELL)
FORMATS = ("float16", "bfloat16")
# Class of lengths by its largest: (smallest, cases).
CLASSES = {1024: (64, 120), 4096: (1025, 40), 16384: (4097, 20)}
BLOCK_N = 64


def noise_of(
    model: ArithmeticModel,
    fmt: str,
    *,
    lengths: tuple[int, int],
    cases: int,
    first_seed: int = 0,
    fault: Fault | None = None,
) -> NoiseStatistics:
    """Pool the noise of `cases` Gaussian problems of one simulated kernel."""
    pool = NoisePool()
    for seed in range(first_seed, first_seed + cases):
        kv_len = int(np.random.default_rng([seed, 99]).integers(lengths[0], lengths[1] + 1))
        problem = make(
            "gauss",
            num_kv_heads=1,
            rows=8,
            kv_len=kv_len,
            head_dim=64,
            fmt=as_format(fmt),
            is_causal=False,
            seed=seed,
        )
        tensors = problem.query, problem.key, problem.value
        tiles = tiling(kv_len, 0, BLOCK_N, BLOCK_N * max(1, kv_len // BLOCK_N // 4))
        out, _ = simulate(
            *tensors, problem.visible, scale=problem.scale, fmt=fmt, model=model, tiles=tiles, fault=fault
        )
        reference, _ = attention(*tensors, is_causal=False, scale=problem.scale)
        sigma = predicted_sigma(*tensors, problem.visible, scale=problem.scale, fmt=fmt, model=model)
        pool.add(out, reference, sigma)
    return pool.statistics()


def main() -> None:
    """Measure all baselines, print and store them."""
    chi: dict[str, dict[str, dict[str, float]]] = {}
    print("| model | format | lengths to | outputs | chi | max r | bias z |\n|---|---|--:|--:|--:|--:|--:|")
    for model in MODELS:
        chi[model.name] = {}
        for fmt in FORMATS:
            stored = chi[model.name][fmt] = {}
            for longest, (shortest, cases) in CLASSES.items():
                found = noise_of(model, fmt, lengths=(shortest, longest), cases=cases)
                stored[str(longest)] = round(found.chi, 4)
                print(
                    f"| {model.name} | {fmt} | {longest} | {found.outputs:,} | {found.chi:.3f} | "
                    f"{found.largest:.2f} | {found.bias:+.2f} |"
                )
    record = {
        "what": "chi of a clean simulated kernel on Gaussian inputs, by the largest kv_len of a class",
        "command": "python -m properties.numerics.noise_baselines",
        "chi": chi,
    }
    BASELINES.parent.mkdir(exist_ok=True)
    BASELINES.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
