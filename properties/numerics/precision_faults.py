"""Which oracle sees which precision fault: 14 faults planted in the simulator, and clean kernels beside them.

    python -m properties.numerics.precision_faults [--fault NAME ...] [--clean-runs 200] [--write]

The three rules of `rivals` look at the same outputs. Cells count the cases in which an oracle or rule objects.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable

from properties.numerics.families import Float64Array, Problem
from properties.numerics.oracles import (
    PROBE_LENGTHS,
    PROBES,
    SEEDS,
    Kernel,
    caught_by,
    header,
    lattice_differs,
    look,
    see,
)
from properties.numerics.report import publish
from properties.numerics.validate import MODELS
from references.arithmetic_model import ArithmeticModel
from references.simulator import FAULTS, Fault, simulate
from references.tiling import tiling


def simulated(fmt: str, model: ArithmeticModel, fault: Fault | None = None) -> Kernel:
    """The simulator, with a fault or without."""

    def attend(problem: Problem, block_n: int, kv_split_size: int) -> tuple[Float64Array, Float64Array]:
        return simulate(
            problem.query, problem.key, problem.value, problem.visible, scale=problem.scale, fmt=fmt, model=model,
            tiles=tiling(problem.key.shape[1], 0, block_n, kv_split_size), fault=fault,
        )  # fmt: skip

    return Kernel(fmt, model, attend)


def clean_run(run: int) -> list[str]:
    """All oracles on one clean simulated kernel, with data of its own; what objected."""
    model = list(MODELS.values())[run % 3]
    fmt = ("float16", "bfloat16", "float32")[run // 3 % 3]
    shapes = [
        ("gauss", 64 + 61 * (run % 37)),
        ("gauss", 1024),
        (PROBES[run % len(PROBES)], PROBE_LENGTHS[run % 3]),
    ]
    kernel = simulated(fmt, model)
    verdicts = look(kernel, shapes, seeds=range(100 + SEEDS * run, 100 + SEEDS * (run + 1)))
    objected = caught_by(verdicts, kernel)
    objected += ["single alarm"] * int(verdicts.objections["alarm"] > 0 and "alarm" not in objected)
    return objected + ["lattice"] * int(lattice_differs(kernel, run))


def table(fmt: str, faults: Iterable[Fault]) -> tuple[list[str], list[str], list[str]]:
    """Lines of one format's table, the faults nothing caught, and those nothing caught on N(0, 1)."""
    lines = header(fmt, "fault")
    missed: list[str] = []
    missed_on_gaussian: list[str] = []
    for fault in (None, *faults):
        seen = see(simulated(fmt, MODELS["Hopper"], fault))
        lines.append(f"| {' | '.join((fault or 'none (clean)', *seen.cells))} |")
        if fault is not None:
            missed += [] if seen.anywhere else [fault]
            missed_on_gaussian += [] if seen.on_gaussian else [fault]
    return lines, missed, missed_on_gaussian


def main(argv: list[str] | None = None) -> int:
    """Print the tables; return 1 if a fault escaped all oracles or a clean kernel raised one."""
    parser = argparse.ArgumentParser(prog="python -m properties.numerics.precision_faults", description=__doc__)
    parser.add_argument("--clean-runs", type=int, default=200)
    parser.add_argument("--fault", nargs="*", choices=FAULTS, default=FAULTS, metavar="NAME", help="only these")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/numerics.md")
    arguments = parser.parse_args(argv)
    if arguments.write and arguments.fault != FAULTS:
        parser.error("--write needs all faults")

    wide = tuple(fault for fault in arguments.fault if fault == "tf32")
    narrow = tuple(fault for fault in arguments.fault if fault != "tf32")
    lines: list[str] = []
    escaped: list[str] = []
    planted: dict[str, tuple[Fault, ...]] = {"bfloat16": narrow, "float16": narrow, "float32": wide}
    for fmt, faults in planted.items():
        if not faults:
            continue
        body, missed, missed_on_gaussian = table(fmt, faults)
        escaped += missed
        lines += [
            *body,
            "",
            f"Not seen on N(0, 1) by gate, lse, alarm or noise: {', '.join(missed_on_gaussian) or 'none'}.",
            "",
        ]
    lines.append(f"Faults that escaped every oracle: {', '.join(escaped) or 'none'}.")

    objections = Counter(name for run in range(arguments.clean_runs) for name in clean_run(run))
    listed = ", ".join(f"{name} {count}" for name, count in sorted(objections.items())) or "none"
    lines.append(f"Clean kernels, {arguments.clean_runs} independent runs: objections: {listed}.")
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        publish("precision faults", text)
    return 1 if escaped or objections else 0


if __name__ == "__main__":
    sys.exit(main())
