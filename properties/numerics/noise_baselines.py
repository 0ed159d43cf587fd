"""Measure chi of clean simulated kernels on Gaussian inputs and store it in fixtures/noise_baselines.json.

    python -m properties.numerics.noise_baselines

The inputs are Gaussian with lengths 64..1024 and head_dim 64; the kernels are the interpreter's, Ampere's and
Hopper's simulated arithmetic. chi differs from 1 because roundings are not exactly independent and uniform;
what matters is that it is stable, so that a growth of 10 % is a fault and not chance.
"""

from __future__ import annotations

import json

import numpy as np

from properties.numerics.families import make
from references.arithmetic_model import AMPERE, HOPPER, INTERPRETER, ArithmeticModel
from references.attention import attention
from references.noise import BASELINES, NoisePool, NoiseStatistics, predicted_sigma
from references.rounding import as_format
from references.simulator import Fault, simulate

MODELS = (INTERPRETER, AMPERE, HOPPER)
FORMATS = ("float16", "bfloat16", "float32")
CASES = 120
BLOCK_N = 64
SPLIT = 256


def noise_of(
    model: ArithmeticModel, fmt: str, *, cases: int, first_seed: int = 0, fault: Fault | None = None
) -> NoiseStatistics:
    """Pool the noise of `cases` Gaussian problems of one simulated kernel."""
    pool = NoisePool()
    for seed in range(first_seed, first_seed + cases):
        kv_len = int(np.random.default_rng([seed, 99]).integers(64, 1025))
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
        tiles = [
            [(i, min(i + BLOCK_N, s + SPLIT, kv_len)) for i in range(s, min(s + SPLIT, kv_len), BLOCK_N)]
            for s in range(0, kv_len, SPLIT)
        ]
        out, _ = simulate(
            *tensors, problem.visible, scale=problem.scale, fmt=fmt, model=model, tiles=tiles, fault=fault
        )
        reference, _ = attention(*tensors, is_causal=False, scale=problem.scale)
        sigma = predicted_sigma(*tensors, problem.visible, scale=problem.scale, fmt=fmt, model=model)
        pool.add(out, reference, sigma)
    return pool.statistics()


def main() -> None:
    """Measure all baselines, print and store them."""
    chi: dict[str, dict[str, float]] = {}
    outputs = 0
    print("| model | format | chi | max r | bias z |\n|---|---|---|---|---|")
    for model in MODELS:
        chi[model.name] = {}
        for fmt in FORMATS:
            found = noise_of(model, fmt, cases=CASES)
            chi[model.name][fmt] = round(found.chi, 4)
            outputs = found.outputs
            print(f"| {model.name} | {fmt} | {found.chi:.3f} | {found.largest:.2f} | {found.bias:+.2f} |")
    record = {
        "what": "chi of a clean kernel on Gaussian inputs (simulated arithmetic)",
        "command": "python -m properties.numerics.noise_baselines",
        "outputs_each": outputs,
        "chi": chi,
    }
    BASELINES.parent.mkdir(exist_ok=True)
    BASELINES.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
