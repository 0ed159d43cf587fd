"""What each oracle, and each of the rules of ``rivals``, says about a kernel on one set of cases.

The gate of out, the gate of lse, the alarm (counted only where 3 of 5 data seeds of one shape exceed it), the
calibrated noise pooled over all Gaussian cases, and the exact lattice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from properties.numerics.families import Float64Array, Problem, make
from properties.numerics.rivals import RIVALS, Compared, eager_attention
from properties.numerics.validate import ALARM_LAMBDA, utilisation
from references.arithmetic_model import ArithmeticModel
from references.attention import attention
from references.error_bounds import budget
from references.lattice import solve
from references.lattice_inputs import from_draws
from references.noise import NoisePool, baseline_chi, predicted_sigma
from references.rounding import as_format, decode, encode
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


@dataclass(frozen=True)
class Kernel:
    """What is judged.

    Attributes:
        fmt: of its inputs and outputs.
        model: the arithmetic that it claims.
        attend: (problem, block_n, kv_split_size) -> out [num_q_heads, q_len, head_dim] and lse [num_q_heads, q_len].
    """

    fmt: str
    model: ArithmeticModel
    attend: Callable[[Problem, int, int], tuple[Float64Array, Float64Array]]


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


def judge(verdicts: Verdicts, shape: tuple[str, int], problem: Problem, kernel: Kernel) -> None:
    """Run one case and let every oracle and rule but the lattice look at it."""
    tensors = problem.query, problem.key, problem.value
    fmt, model, kv_len = kernel.fmt, kernel.model, problem.key.shape[1]
    tiles = tiling(kv_len, 0, BLOCK_N, splits(kv_len))
    out, lse = kernel.attend(problem, BLOCK_N, splits(kv_len))
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


def look(kernel: Kernel, shapes: Iterable[tuple[str, int]], *, seeds: Iterable[int] = range(SEEDS)) -> Verdicts:
    """All cases of the shapes (family, kv_len), each with every data seed."""
    verdicts = Verdicts()
    for family, kv_len in shapes:
        for seed in seeds:
            problem = make(
                family, num_kv_heads=1, rows=ROWS, kv_len=kv_len, head_dim=HEAD_DIM,
                fmt=as_format(kernel.fmt), is_causal=False, seed=seed + 7_000,
            )  # fmt: skip
            judge(verdicts, (family, kv_len), problem, kernel)
    return verdicts


def lattice_differs(kernel: Kernel, seed: int) -> bool:
    """Whether one lattice case shows a bit that is not the oracle's; half of them have shifted logits."""
    rng = np.random.default_rng([seed, 41])
    kv_len, head_dim = int(rng.integers(65, 600)), int(rng.choice((16, 64)))
    query = rng.integers(0, 1 << 16, (2, 4, head_dim))
    key, value = rng.integers(0, 1 << 16, (2, 1, kv_len, head_dim))
    lattice = from_draws(query, key, value, key_offset=64 * (seed % 2))
    visible = np.ones((4, kv_len), bool)
    q, k, v = (decode(bits, kernel.fmt) for bits in lattice.bits(kernel.fmt))
    out, lse = kernel.attend(Problem(q, k, v, visible, lattice.scale), 32, 64)
    exact = solve(q, k, v, visible, scale_exponent=0, fmt=kernel.fmt)
    same_lse = np.array_equal(lse[exact.lse_is_exact], exact.lse[exact.lse_is_exact])
    return not (np.array_equal(encode(out, kernel.fmt), exact.out_bits) and same_lse)


LATTICE_CASES = 20


def caught_by(verdicts: Verdicts, kernel: Kernel) -> list[str]:
    """The oracles (not the lattice) that object to what was seen."""
    names = [name for name in ("gate out", "gate lse") if verdicts.objections[name]]
    names += ["alarm"] if verdicts.reproduced_alarms else []
    names += ["noise"] if noise_of(verdicts, kernel)[1] else []
    return names


def noise_of(verdicts: Verdicts, kernel: Kernel) -> tuple[str, list[str]]:
    """Figures of the pooled noise, and what is wrong with it: chi of each length, bias of all together."""
    if not verdicts.noise:
        return "-", []
    total = NoisePool()
    alarms, chis = [], []
    for kv_len, pool in verdicts.noise.items():
        total.merge(pool)
        statistics = pool.statistics()
        baseline = baseline_chi(kernel.model.name, kernel.fmt, kv_len)
        alarms += statistics.alarms(baseline)
        chis.append(f"{statistics.chi / baseline:.3g}")
    statistics = total.statistics()
    alarms += statistics.alarms(np.inf)
    return f"chi {'/'.join(chis)}, z {statistics.bias:+.1f}, r {statistics.largest:.3g}", alarms


@dataclass(frozen=True)
class Seen:
    """What objected to a kernel: cells of the table, and the oracles on N(0, 1) and on all cases."""

    cells: tuple[str, ...]
    on_gaussian: tuple[str, ...]
    anywhere: tuple[str, ...]


def see(kernel: Kernel) -> Seen:
    """Let all oracles and rules look at a kernel."""
    gaussian = look(kernel, [("gauss", n) for n in GAUSSIAN_LENGTHS])
    probes = look(kernel, [(family, n) for family in PROBES for n in PROBE_LENGTHS])
    lattice = sum(lattice_differs(kernel, seed) for seed in range(LATTICE_CASES))
    figures, noise = noise_of(gaussian, kernel)
    cells = (
        *(f"{gaussian.objections[name]}" for name in ORACLES),
        f"**{figures}**" if noise else figures,
        *(f"{probes.objections[name]} ({probes.worst[name]:.3g})" for name in ORACLES),
        f"{lattice}",
        *(f"{gaussian.objections[name]} + {probes.objections[name]}" for name in RIVALS),
    )
    on_gaussian, on_probes = caught_by(gaussian, kernel), caught_by(probes, kernel)
    anywhere = dict.fromkeys([*on_gaussian, *on_probes, *(["lattice"] if lattice else [])])
    return Seen(cells, tuple(on_gaussian), tuple(anywhere))


def header(fmt: str, *columns: str) -> list[str]:
    """What the table of a format counts, and its first lines; ``columns`` say what a row is."""
    gaussian_cases = len(GAUSSIAN_LENGTHS) * SEEDS
    probe_cases = len(PROBES) * len(PROBE_LENGTHS) * SEEDS
    return [
        f"**{fmt}**: {gaussian_cases} cases on N(0, 1), {probe_cases} on probes (worst error / budget in "
        f"brackets), {LATTICE_CASES} on the lattice. Noise: chi over its baseline at kv_len "
        f"{'/'.join(map(str, GAUSSIAN_LENGTHS))}, bias z, max r. The rules: N(0, 1) + probes.",
        "",
        "| "
        + " | ".join((*columns, "N(0,1): gate out", "gate lse", "alarm", "noise"))
        + " | "
        + " | ".join(("probes: gate out", "gate lse", "alarm", "lattice", *RIVALS))
        + " |",
        "|---|" + "---|" * (len(columns) - 1) + "--:|" * 3 + "---|" + "--:|" * (4 + len(RIVALS)),
    ]
