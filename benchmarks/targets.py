"""What the rows say about the targets, cell by cell; met or not, with the worst cell named.

The targets were set for one H100. What they say as a ratio or a fraction of measured bandwidth holds on any GPU; an
absolute time is restated as a multiple of the floor, and named so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.report import Row

SDPA = ("cudnn", "flash", "efficient")
TITLES = ("target", "must", "cells", "met", "worst", "where")

# 24.5 us allowed where 22.4 us are the floor.
SEED_OVER_FLOOR = 24.5 / 22.4


@dataclass(frozen=True)
class Target:
    """One line of the table of targets.

    Attributes:
        what: in words.
        must: the condition.
        count: cells it was judged on.
        met: how many meet it.
        worst: the value furthest from it.
        where: that cell.
    """

    what: str
    must: str
    count: int
    met: int
    worst: float
    where: str

    def cells(self) -> list[str]:
        """For a table."""
        return [self.what, self.must, str(self.count), str(self.met), f"{self.worst:.3g}", self.where]


def best(row: Row, names: Sequence[str] = SDPA) -> float | None:
    """Time of the fastest of these peers over ours."""
    ratios = [ratio for name in names if (ratio := row.ratio(name)) is not None]
    return min(ratios, default=None)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def judge(rows: Sequence[Row]) -> list[Target]:
    """Every target that at least one row says something about."""
    decode = [row for row in rows if row.suite == "decode"]
    seed = [row for row in rows if row.suite == "seed" and row.shape.get("kv_len") == 2048]
    ragged = [row for row in rows if row.suite == "ragged"]
    prefill = [row for row in rows if row.suite == "prefill"]
    square = [r for r in prefill if r.shape["is_causal"] and r.shape["q_len"] == r.shape["kv_len"]]
    chunk = [r for r in prefill if r.shape["q_len"] < r.shape["kv_len"]]
    found = [
        _at_least("decode against the best SDPA backend", 1.0, decode, best),
        _mean("decode, geometric mean of that", 1.2, decode, best),
        _at_least("decode, K and V >= 134 MB: of copy", 0.93, [r for r in decode if r.bytes >= 134e6], _fraction),
        _at_most("decode, <= 17 MB: over cuDNN's time", 0.75, [r for r in decode if r.bytes <= 17e6], _over_cudnn),
        _at_most(
            "seed shape at 2048: over the floor",
            SEED_OVER_FLOOR,
            [r for r in seed if (r.shape["batch"], r.shape["num_kv_heads"]) == (16, 8)],
            _over_floor,
        ),
        _at_most(
            "seed at 2048 with 2 kv heads: us",
            10.0,
            [r for r in seed if (r.shape["batch"], r.shape["num_kv_heads"]) == (16, 2)],
            _us,
        ),
        _at_least("ragged, valid bytes: of copy", 0.88, ragged, _fraction),
        _at_least("ragged against SDPA with a mask", 3.0, ragged, best),
        _at_least("causal prefill, D 64, against cuDNN", 1.0, _of_dim(square, 64), _cudnn),
        _at_least("causal prefill, D 128, against cuDNN", 0.9, _of_dim(square, 128), _cudnn),
        _at_least("chunked prefill against the best peer", 1.0, chunk, lambda row: best(row, list(row.peers))),
        _at_most("host time of a decode call: us", 12.0, _with(rows, "host", "us_target"), _us),
        _at_most("growth over the decode steps: bytes", 0.0, _with(rows, "memory", "growth"), _note("growth")),
        _at_most("workspace: share of the cache", 0.01, _with(rows, "memory", "workspace"), _note("workspace")),
    ]
    return [target for target in found if target is not None]


Measure = Callable[["Row"], "float | None"]


def _fraction(row: Row) -> float | None:
    return row.fraction_of_copy


def _us(row: Row) -> float | None:
    return row.us


def _cudnn(row: Row) -> float | None:
    return row.ratio("cudnn")


def _over_cudnn(row: Row) -> float | None:
    ratio = row.ratio("cudnn")
    return None if ratio is None else 1 / ratio


def _over_floor(row: Row) -> float | None:
    return row.us / row.floor_us if row.us and row.floor_us else None


def _note(name: str) -> Measure:
    return lambda row: float(row.notes[name])


def _with(rows: Sequence[Row], suite: str, note: str) -> list[Row]:
    return [row for row in rows if row.suite == suite and note in row.notes]


def _of_dim(rows: Sequence[Row], head_dim: int) -> list[Row]:
    return [row for row in rows if row.shape["head_dim"] == head_dim]


def _values(rows: Sequence[Row], measure: Measure) -> list[tuple[float, str]]:
    return [(value, row.case) for row in rows if (value := measure(row)) is not None]


def _at_least(what: str, bound: float, rows: Sequence[Row], measure: Measure) -> Target | None:
    values = _values(rows, measure)
    if not values:
        return None
    return Target(what, f">= {bound:g}", len(values), sum(v >= bound for v, _ in values), *min(values))


def _at_most(what: str, bound: float, rows: Sequence[Row], measure: Measure) -> Target | None:
    values = _values(rows, measure)
    if not values:
        return None
    return Target(what, f"<= {bound:.3g}", len(values), sum(v <= bound for v, _ in values), *max(values))


def _mean(what: str, bound: float, rows: Sequence[Row], measure: Measure) -> Target | None:
    values = [value for value, _ in _values(rows, measure)]
    if not values:
        return None
    mean = geometric_mean(values)
    return Target(what, f">= {bound:g}", 1, int(mean >= bound), mean, f"{len(values)} cells")
