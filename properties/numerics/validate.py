"""Does the gate hold? A simulated correct kernel against its budget, over families, formats and lengths.

    python -m properties.numerics.validate [--outputs 1000000] [--write]

Every case is one sequence through the simulator: the interpreter's arithmetic in three orders of summation,
Ampere's and Hopper's tensor cores bit for bit; exp2, log2 and division correctly rounded, or wrong by all the
model allows, at random or with signs set against the output. A violation is an output or an lse farther from
the float64 reference than its budget. The command exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from properties.numerics.families import FAMILIES, Problem, make
from properties.numerics.report import publish
from references.arithmetic_model import AMPERE, HOPPER, INTERPRETER, ArithmeticModel
from references.attention import attention
from references.error_bounds import budget
from references.rounding import Format, as_format
from references.simulator import Errors, Order, simulate
from references.tiling import Tiles, tiling

FORMATS = ("float16", "bfloat16", "float32")
MODELS = {model.name: model for model in (INTERPRETER, AMPERE, HOPPER)}
SHORT = (1, 2, 3, 5, 16, 17, 31, 64, 65, 100, 127, 128, 129, 250, 300, 513, 1000, 1024)
LONG = (2049, 4096, 8192, 16384, 32768)
HEAD_DIMS = (64, 16, 128, 80, 1, 64)
BLOCKS = (16, 32, 64, 128)
ORDERS: tuple[Order, ...] = ("blas", "forward", "reverse")
ERRORS: tuple[Errors, ...] = ("nominal", "signed", "random")
ALARM_LAMBDA = 6.0


@dataclass(frozen=True)
class Experiment:
    """One simulated call."""

    family: str
    fmt: str
    model: str
    kv_len: int
    head_dim: int
    block_n: int
    kv_split_size: int | None
    is_causal: bool
    order: Order
    errors: Errors
    contracted: bool
    seed: int
    num_kv_heads: int = 2
    rows: int = 8


@dataclass(frozen=True)
class Outcome:
    """Errors in units of the budget, every output and every lse; nan-free, infinite where not finite."""

    out: NDArray[np.float64]
    lse: NDArray[np.float64]
    alarm: NDArray[np.float64]


def plan(outputs: int, families: Iterable[str] = tuple(FAMILIES), seed: int = 0) -> Iterator[Experiment]:
    """Experiments that visit all families, formats and models equally, until so many outputs are planned."""
    rng = np.random.default_rng([seed, 2026])
    planned = 0
    for turn in itertools.count():
        for family, fmt, model in itertools.product(families, FORMATS, MODELS):
            if planned >= outputs:
                return
            lengths = LONG if turn % 6 == 5 else SHORT
            block_n = int(rng.choice(BLOCKS))
            splits = int(rng.choice((0, 0, 1, 2, 5)))
            kv_len = int(rng.choice(lengths))
            experiment = Experiment(
                family=family,
                fmt=fmt,
                model=model,
                kv_len=kv_len,
                head_dim=int(rng.choice(HEAD_DIMS)),
                block_n=block_n,
                kv_split_size=block_n * max(splits, kv_len // block_n // 8) if splits else None,
                is_causal=bool(rng.integers(2)),
                order=ORDERS[int(rng.integers(3))],
                errors=ERRORS[turn % 3],
                contracted=MODELS[model].contraction and bool(rng.integers(2)),
                seed=turn,
            )
            planned += experiment.num_kv_heads * experiment.rows * experiment.head_dim
            yield experiment


def utilisation(error: NDArray[np.float64], allowed: NDArray[np.float64]) -> NDArray[np.float64]:
    """error / allowed; 0 where there is no error, infinite where it is not finite or nothing is allowed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / allowed)
    return np.where(np.isnan(ratio), np.inf, ratio)


def measure(
    experiment: Experiment,
    model: ArithmeticModel,
    *,
    claimed: ArithmeticModel | None = None,
    with_alarm: bool = True,
) -> Outcome:
    """Simulate one experiment and compare it with the reference, within the budget of the claimed model."""
    e = experiment
    fmt = as_format(e.fmt)
    problem = make(
        e.family,
        num_kv_heads=e.num_kv_heads,
        rows=e.rows,
        kv_len=e.kv_len,
        head_dim=e.head_dim,
        fmt=fmt,
        is_causal=e.is_causal,
        seed=e.seed,
    )
    tensors = problem.query, problem.key, problem.value
    # The last keys are a call's new tokens: a segment with tiles of its own.
    new = min(e.rows, e.kv_len) if e.is_causal else 0
    tiles = tiling(e.kv_len - new, new, e.block_n, e.kv_split_size)
    out, lse = simulate(
        *tensors,
        problem.visible,
        scale=problem.scale,
        fmt=fmt,
        model=model,
        tiles=tiles,
        order=e.order,
        errors=e.errors,
        contracted=e.contracted,
        seed=e.seed,
    )
    return compared(problem, out, lse, e.is_causal, fmt, claimed or model, tiles, with_alarm=with_alarm)


def compared(
    problem: Problem,
    out: NDArray[np.float64],
    lse: NDArray[np.float64],
    is_causal: bool,
    fmt: Format,
    model: ArithmeticModel,
    tiles: Tiles,
    *,
    with_alarm: bool = True,
) -> Outcome:
    """Compare results with the reference."""
    tensors = problem.query, problem.key, problem.value
    reference, reference_lse = attention(*tensors, is_causal=is_causal, scale=problem.scale)

    def allowed(confidence: float | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        found = budget(
            *tensors,
            problem.visible,
            scale=problem.scale,
            fmt=fmt,
            model=model,
            tiles=tiles,
            alarm_lambda=confidence,
        )
        return found.out, found.lse

    gate, gate_lse = allowed(None)
    error = np.abs(out - reference)
    seen = problem.visible.any(axis=1)
    lse_error = np.where(seen, np.abs(lse - np.where(seen, reference_lse, 0.0)), lse != -np.inf)
    alarm = utilisation(error, allowed(ALARM_LAMBDA)[0]) if with_alarm else np.zeros(0)
    return Outcome(utilisation(error, gate).ravel(), utilisation(lse_error, gate_lse).ravel(), alarm.ravel())


@dataclass
class Tally:
    """Utilisations of several experiments."""

    out: list[NDArray[np.float64]] = field(default_factory=list)
    lse: list[NDArray[np.float64]] = field(default_factory=list)
    alarm: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one more experiment."""
        self.out.append(outcome.out)
        self.lse.append(outcome.lse)
        self.alarm.append(outcome.alarm)

    def row(self) -> str:
        """Cells of the table: count, maximum and median of out, maximum of lse, alarms."""
        out, lse, alarm = (np.concatenate(x) for x in (self.out, self.lse, self.alarm))
        alarms = int((alarm > 1).sum())
        violations = int((out > 1).sum()) + int((lse > 1).sum())
        maxima = f"{out.max():.3f} | {np.median(out):.4f} | {lse.max():.3f} | {np.median(lse):.4f}"
        return f"{out.size:,} | {maxima} | {violations} | {alarms} (max {alarm.max(initial=0):.2f})"


def main(argv: list[str] | None = None) -> int:
    """Run the experiments, print the tables, return 1 if the gate was violated."""
    parser = argparse.ArgumentParser(prog="python -m properties.numerics.validate", description=__doc__)
    parser.add_argument("--outputs", type=int, default=1_000_000, help="how many outputs to simulate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--write", action="store_true", help="put the table into docs/numerics.md")
    arguments = parser.parse_args(argv)

    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    violations = 0
    best: dict[str, tuple[float, Experiment]] = {}
    for experiment in plan(arguments.outputs, arguments.families, arguments.seed):
        outcome = measure(experiment, MODELS[experiment.model])
        for key in ((experiment.fmt, experiment.family), (experiment.fmt, "all"), ("all", experiment.model)):
            tallies[key].add(outcome)
        worst = float(max(outcome.out.max(initial=0.0), outcome.lse.max(initial=0.0)))
        if worst > 1:
            violations += 1
            print(f"VIOLATION {worst:.4g}: {experiment}", file=sys.stderr, flush=True)
        if outcome.out.max() > best.get(experiment.fmt, (-1.0, experiment))[0]:
            best[experiment.fmt] = (float(outcome.out.max()), experiment)

    lines = [
        "| format | family | outputs | max out | median out | max lse | median lse | violations | alarms |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for fmt, family in sorted(tallies, key=lambda k: (k[0] == "all", FORMATS.index(k[0]) if k[0] in FORMATS else 9)):
        lines.append(f"| {fmt} | {family} | {tallies[fmt, family].row()} |")
    lines += ["", "Nearest to the gate:", ""]
    lines += [f"* {fmt}: {value:.4f} in `{experiment}`" for fmt, (value, experiment) in sorted(best.items())]
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        publish("validation", text)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
