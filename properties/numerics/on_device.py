"""Does the gate hold on the device at hand? Shipped kernels against their budget, over families, formats and lengths.

    python -m properties.numerics.on_device [--outputs 200000] [--write]

The experiments are those of ``validate``, not causal and with splits of whole tiles, through the split kernel: on a
GPU, or in Triton's interpreter. The command exits with 1 if an output or an lse is farther from the float64 reference
than its budget.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

from properties import device as devices
from properties.numerics.families import make
from properties.numerics.planted_faults import shipped
from properties.numerics.report import publish
from properties.numerics.validate import FORMATS, Experiment, Outcome, Tally, compared, plan
from references.rounding import as_format
from references.tiling import tiling


def measure(e: Experiment) -> Outcome:
    """Run one experiment and compare it with the reference, within the budget of the device's model."""
    fmt, kernel = as_format(e.fmt), shipped(e.fmt)
    problem = make(
        e.family,
        num_kv_heads=e.num_kv_heads,
        rows=e.rows,
        kv_len=e.kv_len,
        head_dim=e.head_dim,
        fmt=fmt,
        is_causal=False,
        seed=e.seed,
    )
    kv_split_size = e.kv_split_size or e.block_n * -(-e.kv_len // e.block_n)
    out, lse = kernel.attend(problem, e.block_n, kv_split_size)
    return compared(problem, out, lse, False, fmt, kernel.model, tiling(e.kv_len, 0, e.block_n, kv_split_size))


def main(argv: list[str] | None = None) -> int:
    """Run the experiments, print the table, return 1 if the gate was violated."""
    parser = argparse.ArgumentParser(prog="python -m properties.numerics.on_device", description=__doc__)
    parser.add_argument("--outputs", type=int, default=200_000, help="how many outputs to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/numerics.md")
    arguments = parser.parse_args(argv)

    device = devices.current()  # before anything imports Triton
    tallies: dict[str, Tally] = defaultdict(Tally)
    violations = 0
    for experiment in plan(arguments.outputs, seed=arguments.seed):
        outcome = measure(experiment)
        tallies[experiment.fmt].add(outcome)
        worst = float(max(outcome.out.max(initial=0.0), outcome.lse.max(initial=0.0)))
        if worst > 1:
            violations += 1
            print(f"VIOLATION {worst:.4g}: {experiment}", file=sys.stderr, flush=True)
    lines = [
        f"{devices.describe(device)}:",
        "",
        "| format | outputs | max out | median out | max lse | median lse | violations | alarms |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [f"| {fmt} | {tallies[fmt].row()} |" for fmt in FORMATS if fmt in tallies]
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        publish(f"gate on {device}", text)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
