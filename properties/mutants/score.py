"""``python -m properties mutants``: put mutants on trial over all cores, and say how strong the laws are."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from properties.mutants import record
from properties.mutants.catalogue import ALL, select
from properties.mutants.mutant import Mutant, edited
from properties.mutants.report import Score, markdown, table
from properties.mutants.trial import GPU_CASE_SECONDS, KILLED, Effort, Original, Verdict, try_mutant
from properties.verify import EXIT_FAILS, EXIT_HOLDS, PROFILES

# A profile says how many cases a law gets; this is how long one mutant may take, whatever the number of laws.
SECONDS = {"dev": 60.0, "ci": 240.0, "nightly": 1800.0}
EXAMPLES = {"dev": 30}
FAST_EXAMPLES, FAST_SECONDS, FAST_SHRINK_SECONDS = 60, 40.0, 2.0
SHRINK_SECONDS = {"dev": 4.0, "ci": 4.0, "nightly": 20.0}


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    ids: tuple[str, ...] = ()
    category: str | None = None
    profile: str = "ci"
    fast: bool = False
    seconds: float | None = None
    seed: int = 0
    device: str = "auto"
    workers: int = 1
    json_path: Path | None = None
    resume: bool = False
    report_only: bool = False
    markdown_path: Path | None = None


def effort(options: Options) -> Effort:
    """How hard a profile tries."""
    seconds = options.seconds or (FAST_SECONDS if options.fast else SECONDS[options.profile])
    if options.fast:
        return Effort(FAST_EXAMPLES, seconds, FAST_SHRINK_SECONDS, options.seed, siblings=False, baselines=False)
    examples = PROFILES[options.profile].max_examples or EXAMPLES[options.profile]
    return Effort(examples, seconds, SHRINK_SECONDS[options.profile], options.seed)


def run(options: Options, say: Callable[[str], object] = print) -> Score:
    """Put the mutants asked for on trial; write ``json_path`` after each of them.

    Raises:
        AnchorError: one of them does not apply to the source any more; nothing is run.
        ValueError: there is no such mutant.
    """
    mutants = select(options.ids, options.category, one_a_class=options.fast and not options.ids)
    for mutant in mutants:
        edited(mutant)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core a worker
    trying = effort(options)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        original = Original(Path(folder), options.device, trying.case_seconds)
        try:
            description = original.description()
            on_gpu = "CUDA" in description or "sm_" in description
            if on_gpu:
                trying = replace(trying, case_seconds=GPU_CASE_SECONDS)
            kernels = ["", *original.kernels()]
            here = [m for m in mutants if (on_gpu or not m.needs_gpu) and m.needs_kernel in kernels]
            laws = original.laws()
            how = {"device": description, "profile": options.profile, "fast": options.fast, "seed": options.seed}
            path = options.json_path if options.resume or options.report_only else None
            done = record.known(path, here, how, also_wrong=options.report_only)
            say(f"device: {description}")
            say(f"{len(here)} mutants, {len(laws)} laws, at most {trying.max_examples} cases each, seed {options.seed}")
            if done:
                say(f"{len(done)} of them are known from {options.json_path}")
            baselines = original.baselines() if trying.baselines else {}
            absent = tuple(m for m in mutants if m not in here)
            laws_digest = record.laws_digest()

            def score() -> Score:
                verdicts = tuple(done[m.id] for m in here if m.id in done)
                seconds = sum(v.total_seconds for v in verdicts)
                pending = tuple(m for m in here if m.id not in done)
                return Score(
                    verdicts, absent, description, options.profile, len(laws), seconds, baselines, pending, laws_digest
                )

            def one(mutant: Mutant) -> None:
                verdict = try_mutant(mutant, trying, original, options.device)
                verdict.laws_digest = laws_digest
                done[mutant.id] = verdict
                say(_line(verdict))
                if options.json_path is not None:
                    record.write(options.json_path, {**how, **_summary(score())})

            to_do = [] if options.report_only else [m for m in here if m.id not in done]
            with ThreadPoolExecutor(options.workers) as threads:
                # Neutral mutants take longest: they go first.
                list(threads.map(one, sorted(to_do, key=lambda m: not m.neutral)))
        finally:
            original.stop()
    return score()


def _line(verdict: Verdict) -> str:
    mutant = verdict.mutant
    start = f"{mutant.id:5} {mutant.category:8} {verdict.outcome:8}"
    if verdict.outcome == KILLED:
        how = verdict.laws[0].replace("_", " ")
        kind = f" ({verdict.kind})" if verdict.kind not in ("out", "lse", "same bits") else ""
        return f"{start} after {verdict.cases} cases, {verdict.seconds:.1f} s: {how}{kind}: {verdict.summary}"
    return f"{start} {verdict.cases} cases, {verdict.seconds:.1f} s: {mutant.change} {verdict.report}".rstrip()


def main(options: Options) -> int:
    """Run, print the table, write the files; the exit status."""
    score = run(options, lambda text: print(text, flush=True))
    print("\n" + table(score))
    if options.markdown_path is not None:
        options.markdown_path.write_text(markdown(score, time.strftime("%Y-%m-%d")))
    return EXIT_HOLDS if score.perfect else EXIT_FAILS


def _summary(score: Score) -> dict[str, Any]:
    return {
        "laws": score.num_laws,
        "seconds": round(score.seconds, 1),
        "baselines_on_the_original": score.baselines,
        "not_run": {m.id: m.needs_gpu for m in score.absent},
        "mutants": [record.to_record(v) for v in score.verdicts],
        "all": len(ALL),
    }
