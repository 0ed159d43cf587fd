"""Which oracle sees which precision fault: 14 faults planted in the simulator, and clean kernels beside them.

    python -m properties.numerics.precision_faults [--clean-runs 200] [--write]

Oracles: the gate of out, the gate of lse, the alarm (counted only where 3 of 5 data seeds of one shape exceed
it), the calibrated noise pooled over all Gaussian cases, and the exact lattice. The three rules of `rivals`
look at the same outputs. Cells count the cases in which an oracle or rule objects.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from properties.numerics.families import Problem, make
from properties.numerics.report import publish
from properties.numerics.rivals import RIVALS, Compared, eager_attention
from properties.numerics.validate import ALARM_LAMBDA, MODELS, utilisation
from references.arithmetic_model import ArithmeticModel
from references.attention import attention
from references.error_bounds import budget
from references.lattice import solve
from references.lattice_inputs import from_draws
from references.noise import NoisePool, baseline_chi, predicted_sigma
from references.rounding import as_format, decode, encode
from references.simulator import FAULTS, Fault, simulate
from references.tiling import tiling

GAUSSIAN_LENGTHS = (128, 1024, 4096, 16384)
PROBES = (
    "large_logits",
    "dynamic_range",
    "near_ties",
    "rising",
    "positive",
    "constant_values",
    "two_level",
    "level",
    "swamp",
    "big_lse",
    "cancel_qk",
)
PROBE_LENGTHS = (16, 200, 2048)
SEEDS = 5
REPRODUCED = 3
ROWS = 8
HEAD_DIM = 64
BLOCK_N = 64
ORACLES = ("gate out", "gate lse", "alarm")


@dataclass
class Verdicts:
    """What objected, over the cases of one fault and format."""

    cases: int = 0
    objections: Counter[str] = field(default_factory=Counter)
    alarms: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ORACLES, 0.0))
    noise: dict[int, NoisePool] = field(default_factory=lambda: defaultdict(NoisePool))

    @property
    def reproduced_alarms(self) -> int:
        """Shapes in which the alarm was exceeded for at least 3 of 5 data seeds."""
        return sum(count >= REPRODUCED for count in self.alarms.values())


def splits(kv_len: int) -> int:
    """Slots of a split: four splits, where there are that many tiles."""
    return BLOCK_N * max(1, kv_len // BLOCK_N // 4)


def judge(
    verdicts: Verdicts, shape: tuple[str, int], problem: Problem, model: ArithmeticModel, fmt: str,
    fault: Fault | None,
) -> None:  # fmt: skip
    """Run one case and let every oracle and rule but the lattice look at it."""
    tensors = problem.query, problem.key, problem.value
    tiles = tiling(problem.key.shape[1], 0, BLOCK_N, splits(problem.key.shape[1]))
    out, lse = simulate(*tensors, problem.visible, scale=problem.scale, fmt=fmt, model=model, tiles=tiles, fault=fault)
    reference, reference_lse = attention(*tensors, is_causal=False, scale=problem.scale)
    gate, alarm = (
        budget(
            *tensors, problem.visible, scale=problem.scale, fmt=fmt, model=model, tiles=tiles,
            alarm_lambda=confidence,
        )
        for confidence in (None, ALARM_LAMBDA)
    )  # fmt: skip
    with np.errstate(invalid="ignore"):
        error, lse_error = np.abs(out - reference), np.abs(lse - reference_lse)
    ratios = {
        "gate out": utilisation(error, gate.out).max(),
        "gate lse": utilisation(lse_error, gate.lse).max(),
        "alarm": utilisation(error, alarm.out).max(),
    }
    verdicts.cases += 1
    for name, ratio in ratios.items():
        verdicts.worst[name] = max(verdicts.worst[name], float(ratio))
        verdicts.objections[name] += int(ratio > 1)
    verdicts.alarms[shape] += int(ratios["alarm"] > 1)
    if shape[0] == "gauss" and as_format(fmt).precision < model.work.precision:
        sigma = predicted_sigma(*tensors, problem.visible, scale=problem.scale, fmt=fmt, model=model)
        verdicts.noise[shape[1]].add(out, reference, sigma)
    compared = Compared(out, reference, eager_attention(problem, as_format(fmt)))
    for name, accepts in RIVALS.items():
        verdicts.objections[name] += int(not accepts(compared))


def look(
    fault: Fault | None,
    fmt: str,
    model: ArithmeticModel,
    shapes: Iterable[tuple[str, int]],
    *,
    seeds: Iterable[int] = range(SEEDS),
) -> Verdicts:
    """All cases of the shapes (family, kv_len), each with every data seed."""
    verdicts = Verdicts()
    for family, kv_len in shapes:
        for seed in seeds:
            problem = make(
                family, num_kv_heads=1, rows=ROWS, kv_len=kv_len, head_dim=HEAD_DIM, fmt=as_format(fmt),
                is_causal=False, seed=seed + 7_000,
            )  # fmt: skip
            judge(verdicts, (family, kv_len), problem, model, fmt, fault)
    return verdicts


def lattice_differs(fault: Fault | None, fmt: str, model: ArithmeticModel, seed: int) -> bool:
    """Whether one lattice case shows a bit that is not the oracle's; half of them have shifted logits."""
    rng = np.random.default_rng([seed, 41])
    kv_len, head_dim = int(rng.integers(65, 600)), int(rng.choice((16, 64)))
    query = rng.integers(0, 1 << 16, (2, 4, head_dim))
    key, value = rng.integers(0, 1 << 16, (2, 1, kv_len, head_dim))
    lattice = from_draws(query, key, value, key_offset=64 * (seed % 2))
    visible = np.ones((4, kv_len), bool)
    q, k, v = (decode(bits, fmt) for bits in lattice.bits(fmt))
    out, lse = simulate(
        q,
        k,
        v,
        visible,
        scale=lattice.scale,
        fmt=fmt,
        model=model,
        tiles=tiling(kv_len, 0, 32, 64),
        fault=fault,
    )
    exact = solve(q, k, v, visible, scale_exponent=0, fmt=fmt)
    same_lse = np.array_equal(lse[exact.lse_is_exact], exact.lse[exact.lse_is_exact])
    return not (np.array_equal(encode(out, fmt), exact.out_bits) and same_lse)


LATTICE_CASES = 20


def caught_by(verdicts: Verdicts, model: ArithmeticModel, fmt: str) -> list[str]:
    """The oracles (not the lattice) that object to what was seen."""
    names = [name for name in ("gate out", "gate lse") if verdicts.objections[name]]
    names += ["alarm"] if verdicts.reproduced_alarms else []
    names += ["noise"] if noise_of(verdicts, model, fmt)[1] else []
    return names


def noise_of(verdicts: Verdicts, model: ArithmeticModel, fmt: str) -> tuple[str, list[str]]:
    """Figures of the pooled noise, and what is wrong with it: chi of each length, bias of all together."""
    if not verdicts.noise:
        return "-", []
    total = NoisePool()
    alarms, chis = [], []
    for kv_len, pool in verdicts.noise.items():
        total.merge(pool)
        statistics = pool.statistics()
        baseline = baseline_chi(model.name, fmt, kv_len)
        alarms += statistics.alarms(baseline)
        chis.append(f"{statistics.chi / baseline:.3g}")
    statistics = total.statistics()
    alarms += statistics.alarms(np.inf)
    return f"chi {'/'.join(chis)}, z {statistics.bias:+.1f}, r {statistics.largest:.3g}", alarms


def row(fault: Fault | None, fmt: str, model: ArithmeticModel) -> tuple[str, bool, bool]:
    """A table row, whether anything caught the fault, and whether anything did on N(0, 1) alone."""
    gaussian = look(fault, fmt, model, [("gauss", n) for n in GAUSSIAN_LENGTHS])
    probes = look(fault, fmt, model, [(family, n) for family in PROBES for n in PROBE_LENGTHS])
    lattice = sum(lattice_differs(fault, fmt, model, seed) for seed in range(LATTICE_CASES))
    figures, noise = noise_of(gaussian, model, fmt)
    cells = [
        fault or "none (clean)",
        *(f"{gaussian.objections[name]}" for name in ORACLES),
        f"**{figures}**" if noise else figures,
        *(f"{probes.objections[name]} ({probes.worst[name]:.3g})" for name in ORACLES),
        f"{lattice}",
        *(f"{gaussian.objections[name]} + {probes.objections[name]}" for name in RIVALS),
    ]
    on_gaussian = bool(caught_by(gaussian, model, fmt))
    caught = on_gaussian or bool(caught_by(probes, model, fmt)) or lattice > 0
    return "| " + " | ".join(cells) + " |", caught, on_gaussian


def clean_run(run: int) -> list[str]:
    """All oracles on one clean simulated kernel, with data of its own; what objected."""
    model = list(MODELS.values())[run % 3]
    fmt = ("float16", "bfloat16", "float32")[run // 3 % 3]
    shapes = [
        ("gauss", 64 + 61 * (run % 37)),
        ("gauss", 1024),
        (PROBES[run % len(PROBES)], PROBE_LENGTHS[run % 3]),
    ]
    verdicts = look(None, fmt, model, shapes, seeds=range(100 + SEEDS * run, 100 + SEEDS * (run + 1)))
    objected = caught_by(verdicts, model, fmt)
    objected += ["single alarm"] * int(verdicts.objections["alarm"] > 0 and "alarm" not in objected)
    return objected + ["lattice"] * int(lattice_differs(None, fmt, model, run))


def table(fmt: str, faults: Iterable[Fault]) -> tuple[list[str], list[str], list[str]]:
    """Lines of one format's table, the faults nothing caught, and those nothing caught on N(0, 1)."""
    gaussian_cases = len(GAUSSIAN_LENGTHS) * SEEDS
    probe_cases = len(PROBES) * len(PROBE_LENGTHS) * SEEDS
    lines = [
        f"**{fmt}**: {gaussian_cases} cases on N(0, 1), {probe_cases} on probes (worst error / budget in "
        f"brackets), {LATTICE_CASES} on the lattice. Noise: chi over its baseline at kv_len "
        f"{'/'.join(map(str, GAUSSIAN_LENGTHS))}, bias z, max r. The rules: N(0, 1) + probes.",
        "",
        "| fault | N(0,1): gate out | gate lse | alarm | noise | probes: gate out | gate lse | alarm | "
        + " | ".join(("lattice", *RIVALS))
        + " |",
        "|---|" + "--:|" * 3 + "---|" + "--:|" * (4 + len(RIVALS)),
    ]
    lines.append(row(None, fmt, MODELS["Hopper"])[0])
    missed: list[str] = []
    missed_on_gaussian: list[str] = []
    for fault in faults:
        text, caught, on_gaussian = row(fault, fmt, MODELS["Hopper"])
        lines.append(text)
        missed += [] if caught else [fault]
        missed_on_gaussian += [] if on_gaussian else [fault]
    return lines, missed, missed_on_gaussian


def main(argv: list[str] | None = None) -> int:
    """Print the tables; return 1 if a fault escaped all oracles or a clean kernel raised one."""
    parser = argparse.ArgumentParser(prog="python -m properties.numerics.precision_faults", description=__doc__)
    parser.add_argument("--clean-runs", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/numerics.md")
    arguments = parser.parse_args(argv)

    narrow = tuple(fault for fault in FAULTS if fault != "tf32")
    lines: list[str] = []
    escaped: list[str] = []
    planted: dict[str, tuple[Fault, ...]] = {"bfloat16": narrow, "float16": narrow, "float32": ("tf32",)}
    for fmt, faults in planted.items():
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
