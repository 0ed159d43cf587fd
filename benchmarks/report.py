"""Results: rows and header as JSON, as tables on a terminal, as Markdown, and what they say about the targets.

python -m benchmarks.report FILE.json [MORE.json ...] [--markdown] [--plot FILE.png] [--json MERGED.json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import targets

NOT_A_MERIT = "Triton's interpreter on a CPU: these times are no figure of merit, they only show that the programs run."


class ResultError(ValueError):
    """A file does not hold results. One line."""


@dataclass
class Row:
    """One cell.

    Attributes:
        suite, case: what was timed.
        us: median microseconds of a call; None if our result was wrong, which is then not timed.
        bytes: that the case cannot do without, valid ones only; 0 where bytes are not the point.
        fraction_of_copy: bytes / us over the measured copy bandwidth; None where bytes are not the point.
        peers: microseconds of each peer that gave a right result.
        floor_us: what the measured ceilings allow.
        spread: distance of the quartiles over the median.
        refused: peers without a time, and why.
        shape: sizes, for plots.
        notes: what the suite has to say besides.
    """

    suite: str
    case: str
    us: float | None
    bytes: int
    fraction_of_copy: float | None
    peers: dict[str, float]
    floor_us: float | None = None
    spread: float | None = None
    refused: dict[str, str] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def gb_s(self) -> float | None:
        """Valid bytes a second, in GB/s."""
        return self.bytes / self.us / 1e3 if self.us and self.bytes else None

    def ratio(self, peer: str) -> float | None:
        """Time of a peer over ours: above 1 we are faster."""
        return self.peers[peer] / self.us if self.us and peer in self.peers else None


@dataclass
class Results:
    """A run.

    Attributes:
        header: GPU, driver, versions, date, commit, measured ceilings, peers that could not be imported.
        rows: the cells.
        not_run: cells that did not fit in time or memory: suite, case, reason.
    """

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> str:
        """One object; a row a line."""
        rows = ",\n".join("  " + json.dumps(asdict(row)) for row in self.rows)
        missing = ",\n".join("  " + json.dumps(cell) for cell in self.not_run)
        header = json.dumps(self.header, indent=1)
        return f'{{\n"header": {header},\n"rows": [\n{rows}\n],\n"not_run": [\n{missing}\n]\n}}\n'

    def save(self, path: Path) -> None:
        """Write the file as a whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(self.to_json())
        os.replace(part, path)

    @staticmethod
    def load(path: Path) -> Results:
        """Read a file.

        Raises:
            ResultError: it is not one of ours.
        """
        try:
            stored = json.loads(path.read_text())
            rows = [Row(**row) for row in stored["rows"]]
            return Results(dict(stored["header"]), rows, list(stored["not_run"]))
        except OSError as error:
            raise ResultError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{path} must hold results of a benchmark: {type(error).__name__}: {error}") from None


def merged(parts: Sequence[Results]) -> Results:
    """Several runs as one: of a cell measured more than once the last counts; the header is the last one's.

    Raises:
        ResultError: they are not from one kind of GPU.
    """
    gpus = {part.header["gpu"] for part in parts}
    if len(gpus) != 1:
        raise ResultError(f"results to merge must come from one kind of GPU, got {', '.join(sorted(gpus))}")
    rows = {(row.suite, row.case): row for part in parts for row in part.rows}
    missing = {(cell["suite"], cell["case"]): cell for part in parts for cell in part.not_run}
    header = dict(parts[-1].header)
    if len(parts) > 1:
        header["merged"] = [{key: part.header.get(key) for key in ("date", "commit", "copy_tb_s")} for part in parts]
    return Results(header, list(rows.values()), [cell for key, cell in missing.items() if key not in rows])


# -- tables ------------------------------------------------------------------------------------------------------


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of the rows of one suite."""
    names = list(dict.fromkeys(name for row in rows for name in row.peers))
    sized = any(row.bytes for row in rows)
    rated = any("tflops" in row.notes for row in rows)
    titles = ["case", "us", "+-%"]
    titles += ["MB", "GB/s", "of copy", "floor", "x floor"] * sized + ["TFLOP/s"] * rated
    titles += [f"{name} us" for name in names] + [f"{name} x" for name in names] + ["remarks"]
    cells = []
    for row in rows:
        line = [row.case, _number(row.us), _number(None if row.spread is None else 100 * row.spread)]
        if sized:
            line += [
                _number(row.bytes / 1e6),
                _number(row.gb_s),
                "-" if row.fraction_of_copy is None else f"{100 * row.fraction_of_copy:.0f} %",
                _number(row.floor_us),
                "-" if not row.us or not row.floor_us else f"{row.us / row.floor_us:.2f}",
            ]
        if rated:
            line.append(_number(row.notes.get("tflops")))
        line += [_number(row.peers.get(name)) for name in names]
        ratios = [row.ratio(name) for name in names]
        line += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        cells.append([*line, str(row.notes.get("remark", ""))])
    if not any(line[-1] for line in cells):
        titles, cells = titles[:-1], [line[:-1] for line in cells]
    return titles, cells


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def plain(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in plain text."""
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(titles))]

    def text(line: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 or titles[i] == "remarks" else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([text(titles), "  ".join("-" * width for width in widths), *map(text, cells)])


def markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The same for a document."""
    lines = [titles, ["---"] + ["---" if title == "remarks" else "--:" for title in titles[1:]], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(titles: Sequence[str], cells: Sequence[Sequence[str]], caption: str) -> None:
    """Print a table: with rich on a terminal that has it, in plain text everywhere else."""
    if sys.stdout.isatty():
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=caption, box=box.SIMPLE, title_justify="left")
            for i, title in enumerate(titles):
                table.add_column(title, justify="left" if i == 0 or title == "remarks" else "right", no_wrap=i == 0)
            for line in cells:
                table.add_row(*line)
            Console().print(table)
            return
    print(f"\n{caption}\n{plain(titles, cells)}", flush=True)


def suites_of(results: Results) -> dict[str, list[Row]]:
    """Rows by suite, in order."""
    suites: dict[str, list[Row]] = {}
    for row in results.rows:
        suites.setdefault(row.suite, []).append(row)
    return suites


def caption(header: dict[str, Any]) -> list[str]:
    """What was measured on what, in lines."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [
        f"{header['gpu']}, driver {header['driver']}; {versions}",
        f"commit {header['commit']}, {header['date']}",
        f"ceilings of this run: copy {header['copy_tb_s']:.3g} TB/s, read {header['read_tb_s']:.3g} TB/s, "
        f"matrix product {header['matmul_tflops']:.3g} TFLOP/s",
    ]
    if header.get("clocks"):
        lines.append(f"clocks: {header['clocks']}")
    if not header["figure_of_merit"]:
        lines.append(NOT_A_MERIT)
    return lines


def to_markdown(results: Results) -> str:
    """Everything, for docs/performance.md."""
    parts = ["\n".join(f"* {line}" for line in caption(results.header))]
    for suite, rows in suites_of(results).items():
        parts += [f"### {suite}", markdown(*table_of(rows))]
        refused = refusals(rows)
        if refused:
            parts.append("\n".join(f"* no time for {line}" for line in refused))
        remarks = [remark for row in rows for remark in row.notes.get("verdict", [])]
        if remarks:
            parts.append("\n".join(f"* {remark}" for remark in remarks))
    judged = targets.judge(results.rows)
    if judged and results.header["figure_of_merit"]:
        parts += ["### targets", markdown(targets.TITLES, [target.cells() for target in judged])]
    if results.not_run:
        lines = [f"* {cell['suite']} {cell['case']}: {cell['reason']}" for cell in results.not_run]
        parts += ["### not run", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def refusals(rows: Sequence[Row]) -> list[str]:
    """Peers without a time, with the reason and how many cells it concerns."""
    counts: dict[str, int] = {}
    for row in rows:
        for name, reason in row.refused.items():
            counts[f"{name}: {reason}"] = counts.get(f"{name}: {reason}", 0) + 1
    return [f"{text} ({count} of {len(rows)} cells)" for text, count in counts.items()]


def show_targets(results: Results) -> None:
    """Print which targets the rows meet, if they say anything about them."""
    judged = targets.judge(results.rows)
    if judged:
        show(targets.TITLES, [target.cells() for target in judged], "targets (set for an H100)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Show stored results; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Show stored results.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--markdown", action="store_true", help="print tables for docs/performance.md")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time against kv_len")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the files merged into one")
    options = parser.parse_args(arguments)
    try:
        results = merged([Results.load(path) for path in options.files])
        if options.json is not None:
            results.save(options.json)
        if options.plot is not None:
            from benchmarks import plot

            plot.draw(results, options.plot)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        print(to_markdown(results), end="")
        return 0
    print("\n".join(caption(results.header)))
    for suite, rows in suites_of(results).items():
        show(*table_of(rows), suite)
    if results.header["figure_of_merit"]:
        show_targets(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
