"""Time attention with a KV cache against its floor and its peers.

    python benchmarks/benchmark_kv_cache.py [--suite seed|decode|ragged|prefill|host|memory|all] [--peers auto|LIST]
                                            [--json FILE] [--plot FILE.png] [--quick] [--seconds S]

Times are medians of CUDA-graph replays over inputs that rotate past the L2 cache. The ceilings are measured in the
same run, and every kernel is compared with a float64 result before it is timed. Exit status: 0; 1 if a result of
flashcore was wrong; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.contest import Bench
    from benchmarks.report import Results

if __name__ == "__main__":  # from a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

SUITES = ("seed", "host", "memory", "ragged", "prefill", "decode")
"""In the order in which "all" runs them: the longest last, so that it is the one cut short."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmark_kv_cache.py", description=__doc__.split("\n")[0])
    made.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    made.add_argument("--peers", default="auto", metavar="auto|LIST", help="auto, none, or names with commas")
    made.add_argument("--json", type=Path, metavar="FILE", help="save the results, after every cell")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time against kv_len with the roofline")
    made.add_argument("--quick", action="store_true", help="a few cells of each suite, in about a minute")
    made.add_argument("--seconds", type=_seconds, metavar="S", help="cells that do not fit in S seconds are not run")
    return made


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; the exit status."""
    made = parser()
    options = made.parse_args(arguments)
    from benchmarks.clock import Clock

    clock = Clock(options.seconds)
    from properties import device as devices

    device = devices.choose()  # before anything imports Triton
    from benchmarks import ceilings, machine, peers, plot, report
    from benchmarks.contest import Bench

    try:
        selection = peers.select(options.peers)
        if options.plot is not None:
            plot.check(options.plot)
        for path in (options.json, options.plot):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{path.parent} must be a folder to write {path.name} to")
    except (ValueError, ImportError) as error:
        made.error(str(error))
    gc.freeze()  # what is imported is never collected: looking at it before every capture would take longest
    limits = ceilings.measure(device)
    header = machine.describe(device) | {
        "copy_tb_s": limits.copy_tb_s,
        "read_tb_s": limits.read_tb_s,
        "matmul_tflops": limits.matmul_tflops,
        "peers": [peer.name for peer in selection.peers],
        "absent": selection.absent,
        "arguments": {"suite": options.suite, "quick": options.quick, "seconds": options.seconds},
    }
    results = report.Results(header)
    bench = Bench(device, options.quick, clock, selection, limits, results, options.json)
    print("\n".join(report.caption(header)))
    for name, reason in selection.absent.items():
        print(f"peer {name} is absent: {reason}")
    interrupted = False
    for suite in SUITES if options.suite == "all" else (options.suite,):
        try:
            importlib.import_module(f"benchmarks.{suite}_suite").run(bench)
        except KeyboardInterrupt:
            interrupted = True
        _show(results, suite, clock.spent())
        if interrupted:
            break
    if header["figure_of_merit"]:
        report.show_targets(results)
    if options.json is not None:
        results.save(options.json)
    if options.plot is not None:
        plot.draw(results, options.plot)
    _conclude(bench)
    gc.unfreeze()
    if interrupted:
        return 130
    return 1 if bench.wrong else 0


def _show(results: Results, suite: str, seconds: float) -> None:
    from benchmarks import report

    rows = [row for row in results.rows if row.suite == suite]
    if rows:
        report.show(*report.table_of(rows), f"{suite} ({seconds:.0f} s so far)")
    for line in report.refusals(rows):
        print(f"no time for {line}")
    for row in rows:
        for line in row.notes.get("verdict", []):
            print(line)


def _conclude(bench: Bench) -> None:
    from benchmarks import report

    missing = bench.results.not_run
    if missing:
        print(f"\nnot run: {len(missing)} cells")
        reasons: dict[str, list[str]] = {}
        for cell in missing:
            reasons.setdefault(f"{cell['suite']}: {cell['reason'].split(':')[0]}", []).append(cell["case"])
        for reason, cases in reasons.items():
            print(f"  {reason}: {'; '.join(cases[:12])}{' ...' if len(cases) > 12 else ''}")
    for wrong in bench.wrong:
        print(f"WRONG RESULT, not timed: {wrong}")
    if not bench.on_gpu:
        print(f"\n{report.NOT_A_MERIT}")
    print(f"\n{len(bench.results.rows)} cells in {bench.clock.spent():.0f} s")


if __name__ == "__main__":
    sys.exit(main())
