"""The league as a table, as the document ``docs/league.md``, and as a plot."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from properties.case import DTYPES
from properties.subjects.table import WIDTH

Entry = dict[str, Any]
Quantiles = dict[str, float | None]
SHOWN = ("p50", "p90", "p99", "max")
SMALLEST_SHOWN = 1e-4
LARGEST_SHOWN = 1e3
COMMAND = "python -m properties league"
EXPLANATION = """\
The unit is the error budget that [numerics](numerics.md) derives for a kernel of which nothing is known (`PERMISSIVE`
in `references/arithmetic_model.py`): logits, weights and sums in float32, weights cut to the dtype for the product
with the values, tiles and splits of 16 keys. It is one ruler for all, so that the columns compare. 0 is exact, 1 the
most that rounding explains; errors cancel, so right kernels stay well below.

A number is a quantile of |error| / budget over elements, each problem weighing the same; *inf* is not a number.
*wrong* counts problems with an element beyond the subject's own budget (the same one, unless its adapter declares
other arithmetic), with a call that raised, or that killed its process; elements that are wrong are part of the
quantiles. That is less accurate than the budget's kernel, and not by itself a broken promise: in float16 and bfloat16 a
kernel that rounds its logits to the dtype cannot keep it. Rows compare where *problems* is the same: a subject that
only knows causal attention takes about half of them. `flashcore` on a CPU is Triton's interpreter, whose sums are
NumPy's and not a GPU's. Why a subject is wrong, where that is known, is in
[findings](findings.md#verdicts-of-the-laws); `flax-decode` is a release with a known defect, to see that it shows.

Packages that need an environment of their own run in it:
`python -m tox exec -e subject-NAME -- python -m properties league --subject NAME --json FILE`, and `--merge` puts the
files together, provided that the problems were the same.
"""
LEAN = """\
*lean* is the signed bias of the rounding error: the mean of error / budget over the outputs of a problem, positive
where they come out too large, then over the problems that are not wrong; z is that in its standard errors. It is no
verdict: a correct kernel need not have 0 ([numerics](numerics.md#calibrated-noise)). On 60 such problems in float16
and bfloat16 four kernels that round to nearest had +0.04 % to +0.6 %, weights truncated to the dtype -1.9 % and -2.4 %.
"""


def ranked(results: dict[str, Any]) -> list[Entry]:
    """The entries by dtype, within it those with the fewest wrong problems first, then the most accurate."""

    def key(entry: Entry) -> tuple[Any, ...]:
        # Of those without a single number, last.
        p99 = (entry["out"] or {}).get("p99")
        return (
            DTYPES.index(entry["dtype"]),
            len(entry["wrong"]) / entry["problems"],
            float("inf") if p99 is None else p99,
            entry["subject"],
        )

    return sorted(results["entries"], key=key)


def cells(entry: Entry) -> list[str]:
    """One row of the table."""
    numbers = [_number(entry[of], name) for of in ("out", "lse") for name in SHOWN]
    return [entry["dtype"], label(entry), str(entry["problems"]), str(len(entry["wrong"])), *numbers]


HEADER = ("dtype", "subject", "problems", "wrong", *(f"{of} {name}" for of in ("out", "lse") for name in SHOWN))


def table(results: dict[str, Any]) -> list[list[str]]:
    """Header and rows; with a column of signed means if one was measured, which in older results none was."""
    entries = ranked(results)
    rows = [list(HEADER), *(cells(entry) for entry in entries)]
    if any(entry.get("lean") for entry in entries):
        for row, last in zip(rows, ["lean", *(_lean(entry) for entry in entries)], strict=True):
            row.append(last)
    return rows


def _lean(entry: Entry) -> str:
    found = entry.get("lean")
    return f"{100 * found['mean']:+.2g} % (z {found['z']:+.2g})" if found else "-"


def label(entry: Entry) -> str:
    """The subject, and where it ran if that is no CPU."""
    where = f" ({entry['device']})" * (entry["device"] != "cpu")
    return f"{entry['subject']}{where}"


def _number(found: Quantiles | None, name: str) -> str:
    if found is None:
        return "-"
    value = found[name]
    return "inf" if value is None else f"{value:.2g}"


def show(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the table, and of each subject the first problem it is wrong on."""
    console = Console(width=WIDTH, highlight=False) if console is None else console
    header, *rows = table(results)
    shown = Table(*(Column(name, no_wrap=name == "subject") for name in header))
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for entry in ranked(results):
        for problem, what in list(entry["wrong"].items())[:1]:
            console.print(f"{label(entry)}, {entry['dtype']}, problem {problem}: {what}", markup=False)


def markdown(results: dict[str, Any], plot: Path | None, folder: Path) -> str:
    """The document; ``plot`` as it is linked from ``folder``."""
    wrong = [entry for entry in ranked(results) if entry["wrong"]]
    versions = {}
    for entry in results["entries"]:
        versions[label(entry)] = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    image = [f"![error over budget by subject]({plot.resolve().relative_to(folder.resolve())})", ""] if plot else []
    drawn = f"{results['problems']} problems drawn with seed {results['seed']} (`{results['fingerprint']}`)"
    header, *rows = table(results)
    lines = [
        "# Which kernel is the most accurate",
        "",
        f"Written by `{COMMAND} --merge FILE ... --plot FILE --markdown FILE` on {datetime.date.today()}: {drawn}, the",
        "same for every subject and, each rounded to it, for every dtype.",
        "",
        EXPLANATION,
        *[LEAN] * (len(header) > len(HEADER)),
        *image,
        *_table(header, rows),
        "",
        "## Wrong",
        "",
        *(_wrong(entry) for entry in wrong),
        *["None."] * (not wrong),
        "",
        "## Versions",
        "",
        *_table(("subject", "versions"), sorted(versions.items())),
    ]
    return "\n".join(lines) + "\n"


def _wrong(entry: Entry) -> str:
    problem, what = next(iter(entry["wrong"].items()))
    share = f"{len(entry['wrong'])} of {entry['problems']}"
    return f"* {label(entry)}, {entry['dtype']}, {share}; the first is problem {problem}: {what}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def draw(results: dict[str, Any], path: Path) -> None:
    """The plot: of every subject a bar from p25 to p75, a line from p10 to p99, the median and the largest."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    by_dtype = {dtype: [e for e in ranked(results) if e["dtype"] == dtype and e["out"]] for dtype in DTYPES}
    shown = {dtype: entries for dtype, entries in by_dtype.items() if entries}
    heights = [len(entries) for entries in shown.values()]
    figure, axes = plt.subplots(
        len(shown),
        1,
        sharex=True,
        squeeze=False,
        figsize=(8.0, 1.2 + 0.26 * sum(heights)),
        layout="constrained",
        height_ratios=heights,
    )
    for axis, (dtype, entries) in zip(axes[:, 0], shown.items(), strict=True):
        for y, entry in enumerate(reversed(entries)):
            at = {name: _clipped(value) for name, value in entry["out"].items()}
            color = "C3" if entry["wrong"] else "C0"
            axis.hlines(y, at["p10"], at["p99"], color=color, linewidth=1)
            axis.hlines(y, at["p25"], at["p75"], color=color, linewidth=6, alpha=0.4)
            axis.plot(at["p50"], y, "|", color="black", markersize=9)
            axis.plot(at["max"], y, "o", color=color, markersize=4)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlim=(SMALLEST_SHOWN / 1.5, LARGEST_SHOWN * 1.5), ylim=(-0.6, len(entries) - 0.4))
        axis.set_title(dtype, fontsize=9, loc="left")
        axis.set_yticks(range(len(entries)), [label(entry) for entry in reversed(entries)], fontsize=7)
        axis.grid(axis="x", linewidth=0.3)
    axes[-1, 0].set_xlabel("error / budget: bar p25-p75, line p10-p99, tick median, dot largest", fontsize=8)
    figure.suptitle("Red: wrong on a problem", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _clipped(value: float | None) -> float:
    """A value within the axis; what is not a number lies at its end."""
    return LARGEST_SHOWN if value is None else min(max(value, SMALLEST_SHOWN), LARGEST_SHOWN)
