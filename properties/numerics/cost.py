"""What the error budget costs beside the oracle: CPU time of both on the same calls.

    python -m properties.numerics.cost [--cases 120] [--seed 0] [--repeats 9]

The calls are those of cases drawn as ``verify`` draws them, of cases drawn for the law of the alarm, and a few larger
ones. These are timed: the softmax of the oracle (``references.attention``, its explicit loops and nothing else), the
oracle as the laws run it (``references.kv_cache.step``, which also decodes bit patterns and appends slot by slot),
the budgets of out and lse with their overflow classes, of all calls of a case at once as the laws ask for them, and
whether the errors of a simulated kernel raise the alarm, which begins with the gate; for the larger calls also the
products of keys and values that the gate cannot do without, and nothing else. A case is timed again and again,
everything in turn, and the least of each counts, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from properties import answers
from properties.case import Case
from properties.schedule import PlannedStep, problem
from properties.strategies import cases
from properties.strategies.noise import Dtype, noise_cases
from properties.subjects import Subject, activate
from references.alarm_use import Errors, largest_over_alarm
from references.arithmetic_model import INTERPRETER
from references.attention import attention, visible_keys
from references.error_bounds import Sequence, budgets
from references.kv_cache import ReferenceCache
from references.pieces import NUMBERS_AT_ONCE, on_cache_line
from references.rounding import round_to
from references.simulator import simulate
from references.tiling import tiling

ALARM_LAMBDA = 6.0
ALARM_DTYPES: tuple[Dtype, ...] = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Work:
    """The sequences of a case, and its oracle as a whole."""

    sequences: list[Sequence]
    is_causal: bool
    scale: float
    fmt: str
    whole: Callable[[], object] | None

    def oracle(self) -> None:
        """The softmax of every sequence."""
        for one in self.sequences:
            attention(one.query, one.key, one.value, is_causal=self.is_causal, scale=self.scale)

    def products(self) -> None:
        """Of every sequence the products that the gate is made of, with pieces of keys and values in a cache."""
        for one in self.sequences:
            num_kv_heads, kv_len, head_dim = one.key.shape
            queries = one.query.reshape(num_kv_heads, -1, head_dim)
            length, rows = NUMBERS_AT_ONCE // head_dim, queries.shape[1]
            weights, place = np.ones((2 * rows, kv_len)), on_cache_line((length, head_dim))
            for query, keys, values in zip(queries, one.key, one.value, strict=True):
                query = np.ascontiguousarray(query.T)
                size = np.abs(query)
                for piece in (slice(start, start + length) for start in range(0, kv_len, length)):
                    key, value, weight = keys[piece], values[piece], weights[:, piece]
                    room = place[: len(key)]
                    np.abs(key, out=room) @ size, key @ query
                    weight[:rows] @ np.abs(value, out=room), weight[rows:] @ np.square(value, out=room), weight @ value

    def budgets(self) -> None:
        """The gate of every sequence."""
        budgets(self.sequences, scale=self.scale, fmt=self.fmt, model=INTERPRETER)

    def alarm(self) -> None:
        """Whether the errors raise the alarm."""
        largest_over_alarm(
            self.sequences,
            self.errors,
            scale=self.scale,
            fmt=self.fmt,
            model=INTERPRETER,
            alarm_lambda=ALARM_LAMBDA,
        )

    @cached_property
    def errors(self) -> list[Errors]:
        """How far a simulated kernel with the interpreter's arithmetic is from the exact results."""
        found = []
        for one in self.sequences:
            if not one.has_pairs:
                found.append(Errors(np.zeros(one.query.shape), np.zeros(one.query.shape[:2])))
                continue
            inputs, scale = (one.query, one.key, one.value), self.scale
            right = attention(*inputs, is_causal=self.is_causal, scale=scale)
            got = simulate(*inputs, one.visible, scale=scale, fmt=self.fmt, model=INTERPRETER, tiles=one.tiles)
            pairs = zip(got, right, strict=True)
            with np.errstate(invalid="ignore"):
                off = [np.where(ours == exact, 0.0, np.abs(ours - exact)) for ours, exact in pairs]
            found.append(Errors(*(np.where(np.isnan(error), np.inf, error) for error in off)))
        return found


def drawn(count: int, seed_of_run: int, strategy: SearchStrategy[Case] | None = None) -> list[Case]:
    """As many cases as asked for; of the strategy of ``verify`` if none is given."""
    found: list[Case] = []
    options = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @seed(seed_of_run)
    @options
    @given(case=cases() if strategy is None else strategy)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found[:count]


def work_of(case: Case, subject: Subject) -> Work:
    """Everything a case asks of the references."""
    whole = problem(case)

    def oracle() -> list[tuple[PlannedStep, ReferenceCache | None]]:
        caches = [answers.reference_cache(whole.initial)]
        asked = []
        for step in whole.steps:
            parent = caches[step.parent]
            right = answers.results(case, step, parent)
            if right is not None:
                asked.append((step, parent))
            caches.append(parent if right is None else right[2])
        return asked

    with subject.forced(case):
        rows = [row for step, parent in oracle() for row in answers.attended(case, subject, step, parent)]
    return Work([row for row in rows if row.query.size], case.is_causal, case.softmax_scale, case.dtype, oracle)


LARGER = {
    "prompt: 4 heads, 256 tokens, head_dim 64": (4, 4, 256, 256, 64),
    "chunk: 8:2 heads, 64 queries on 512 keys, head_dim 64": (8, 2, 64, 512, 64),
    "decode: 32:8 heads, 2,048 keys, head_dim 128": (32, 8, 1, 2048, 128),
    "decode: 1 head, 32,768 keys, head_dim 64": (1, 1, 1, 32768, 64),
}


def larger(name: str) -> Work:
    """One call of a server's size in float16."""
    num_q_heads, num_kv_heads, q_len, kv_len, head_dim = LARGER[name]
    rng = np.random.default_rng(0)
    query, key, value = (
        round_to(rng.standard_normal((heads, length, head_dim)), "float16")
        for heads, length in ((num_q_heads, q_len), (num_kv_heads, kv_len), (num_kv_heads, kv_len))
    )
    visible = visible_keys(q_len, kv_len, True)
    one = Sequence(query, key, value, visible, tiling(kv_len - q_len, q_len, 64, 512))
    return Work([one], True, head_dim**-0.5, "float16", None)


def timed(works: list[Work], repeats: int) -> dict[str, float]:
    """CPU milliseconds of each function; the products are of the larger calls only."""
    totals = dict.fromkeys(("softmax", "oracle", "budgets", "alarm", "products"), 0.0)
    for work in works:
        assert len(work.errors) == len(work.sequences)  # before the clock starts
        functions: dict[str, Callable[[], object]] = {
            "softmax": work.oracle,
            "oracle": work.whole or work.oracle,
            "budgets": work.budgets,
            "alarm": work.alarm,
        }
        if work.whole is None:
            functions["products"] = work.products
        least = dict.fromkeys(functions, math.inf)
        for _ in range(repeats):
            for name, function in functions.items():
                began = time.process_time()
                function()
                least[name] = min(least[name], time.process_time() - began)
        for name, seconds in least.items():
            totals[name] += 1e3 * seconds
    return totals


def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m properties.numerics.cost", description=__doc__)
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args(argv)
    subject = activate("flashcore")
    sets: dict[str, list[Work]] = {}
    for kind, strategy in (("drawn cases", cases()), ("cases of the law of the alarm", noise_cases(ALARM_DTYPES))):
        several = [work_of(case, subject) for case in drawn(arguments.cases, arguments.seed, strategy)]
        sets[f"{len(several)} {kind}, {sum(len(work.sequences) for work in several)} sequences"] = several
    sets |= {name: [larger(name)] for name in LARGER}
    print(
        "| CPU time | softmax of the oracle | the oracle | budgets | alarm | products | budgets / softmax "
        "| budgets / oracle | alarm / oracle |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, works in sets.items():
        taken = timed(works, arguments.repeats)
        cells = [f"{taken[key]:.1f} ms" for key in ("softmax", "oracle", "budgets", "alarm")]
        cells.append(f"{taken['products']:.1f} ms" if taken["products"] else "-")
        pairs = ("budgets", "softmax"), ("budgets", "oracle"), ("alarm", "oracle")
        cells += [f"{taken[ours] / taken[theirs]:.2f}" for ours, theirs in pairs]
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
