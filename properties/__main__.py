"""``python -m properties``: check a kernel against the laws, replay failures, keep them as regressions."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from properties import subjects, verify
from properties.device import DEVICES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        return verify.EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return verify.EXIT_USAGE
    except (ValueError, OSError, verify.WorkerError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return verify.EXIT_USAGE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m properties", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("verify", help="check all laws over generated cases")
    check.add_argument("--profile", choices=list(verify.PROFILES), default="dev")
    check.add_argument("--law", metavar="NAME", help="only laws whose name contains this")
    check.add_argument("--max-examples", type=_positive, metavar="N", help="cases for each law")
    check.add_argument("--seconds", type=_seconds, metavar="S", help="time of the whole run")
    check.add_argument("--seed", type=int, metavar="N", help="draw the same cases again")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    check.add_argument("-n", "--workers", type=_positive, metavar="WORKERS", help="processes; default one a core")
    check.add_argument(
        "--case-seconds",
        type=_seconds,
        metavar="S",
        help=f"a case that runs longer is a hang; default {verify.CASE_SECONDS:.0f}, "
        f"{verify.SLOW_CASE_SECONDS:.0f} for slow kernels",
    )
    check.add_argument(
        "--worker-gib", type=_gib, metavar="GIB", help="memory a worker may hold; default half the machine's"
    )
    _common(check)
    check.set_defaults(run=_verify)

    again = commands.add_parser("replay", help="run stored cases again")
    again.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _common(again)
    again.set_defaults(run=_replay)

    keep = commands.add_parser("promote", help="keep a stored case as a regression that every run replays")
    keep.add_argument("file", type=Path, metavar="FILE")
    keep.add_argument("--story", required=True, metavar="TEXT", help="what the case shows, in a sentence")
    keep.set_defaults(run=_promote)

    planted = commands.add_parser("mutants", help="plant faults in copies of the source: do the laws see them?")
    planted.add_argument("--id", nargs="+", default=[], metavar="ID", dest="ids", help="only these")
    planted.add_argument("--class", metavar="NAME", dest="category", help="only this class, such as TAIL")
    planted.add_argument("--profile", choices=list(verify.PROFILES), default="ci")
    planted.add_argument("--fast", action="store_true", help="one of each class, few cases, no baselines")
    planted.add_argument("--seconds", type=_seconds, metavar="S", help="time of one mutant, to its first failing case")
    planted.add_argument("--seed", type=int, default=0, metavar="N", help="draw other cases")
    planted.add_argument("--json", type=Path, metavar="FILE", help="also write the results here, after every mutant")
    planted.add_argument("--resume", action="store_true", help="keep what FILE says of mutants that are still the same")
    planted.add_argument("--report-only", action="store_true", help="run none: show what FILE says of them")
    planted.add_argument("--markdown", type=Path, metavar="FILE", help="also write the document here")
    planted.add_argument("-n", "--workers", type=_positive, metavar="WORKERS", help="processes; default one a core")
    planted.add_argument("--device", choices=DEVICES, default="auto")
    planted.set_defaults(run=_mutants)

    names = commands.add_parser("laws", help="list the laws")
    names.set_defaults(run=_laws)
    kernels = commands.add_parser("subjects", help="list the kernels that can be put under test, and what they offer")
    kernels.add_argument("names", nargs="*", metavar="NAME", help="all that is known of these")
    kernels.add_argument(
        "--verdicts",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="put these results of verify --json into docs/findings.md",
    )
    kernels.add_argument("--observe", action="store_true", help="call these: what do they do where kernels differ?")
    kernels.set_defaults(run=_subjects)
    reported = commands.add_parser("findings", help="check the stored findings and list them in docs/findings.md")
    reported.set_defaults(run=_findings)
    league = commands.add_parser("league", help="which kernel is the most accurate, on equal problems")
    league.add_argument(
        "--subject", nargs="+", default=[], metavar="SPEC", dest="subjects", help="default all that can run here"
    )
    league.add_argument("--cases", type=_positive, default=60, metavar="N", help="problems")
    league.add_argument("--seed", type=int, default=0, metavar="S", help="draw other problems")
    league.add_argument(
        "--merge", nargs="+", type=Path, metavar="FILE", help="run nothing: show what these JSON files say"
    )
    league.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    league.add_argument("--plot", type=Path, metavar="FILE", help="also draw them here")
    league.add_argument("--markdown", type=Path, metavar="FILE", help="also write the document here")
    league.add_argument(
        "--case-seconds", type=_seconds, metavar="S", help="a problem that takes longer is a hang; default as of verify"
    )
    league.add_argument("--device", choices=DEVICES, default="auto")
    league.add_argument("-n", "--workers", type=_positive, metavar="WORKERS", help="processes; default one a core")
    league.set_defaults(run=_league)
    probe = commands.add_parser("probe", help="identify the arithmetic of this machine's matrix units")
    probe.add_argument("--out", type=Path, metavar="FILE", help="the model; default fixtures/models/DEVICE.json")
    probe.set_defaults(run=_probe)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument(
        "--subject",
        default=subjects.DEFAULT,
        metavar="SPEC",
        help="kernel under test: flashcore, one that 'subjects' lists, or package.module:function",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seconds(text: str) -> float:
    return _amount(text, "seconds")


def _gib(text: str) -> float:
    return _amount(text, "GiB")


def _amount(text: str, unit: str) -> float:
    value = float(text)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"must be a positive number of {unit}, got {text}")
    return value


def _verify(arguments: argparse.Namespace) -> int:
    options = verify.Options(
        profile=arguments.profile,
        law=arguments.law,
        max_examples=arguments.max_examples,
        seconds=arguments.seconds,
        seed=arguments.seed,
        device=arguments.device,
        subject=arguments.subject,
        json_path=arguments.json,
        case_seconds=arguments.case_seconds,
        worker_bytes=None if arguments.worker_gib is None else int(arguments.worker_gib * 2**30),
    )
    workers, gpus = verify.workers_for(arguments.device, arguments.workers)
    return verify.verify(replace(options, workers=workers, gpus=gpus))


def _replay(arguments: argparse.Namespace) -> int:
    from properties.replaying import replay

    return replay(arguments.files, arguments.subject, arguments.device)


def _promote(arguments: argparse.Namespace) -> int:
    from properties.replaying import promote

    print(promote(arguments.file, arguments.story))
    return 0


def _mutants(arguments: argparse.Namespace) -> int:
    from properties.mutants import score

    workers, _ = verify.workers_for(arguments.device, arguments.workers)
    return score.main(
        score.Options(
            ids=tuple(arguments.ids),
            category=arguments.category,
            profile=arguments.profile,
            fast=arguments.fast,
            seconds=arguments.seconds,
            seed=arguments.seed,
            device=arguments.device,
            workers=workers,
            json_path=arguments.json,
            resume=arguments.resume,
            report_only=arguments.report_only,
            markdown_path=arguments.markdown,
        )
    )


def _laws(arguments: argparse.Namespace) -> int:
    del arguments
    from properties import device, laws

    device.choose()
    for name, law in laws.discover().items():
        print(f"{name}\n    {law.sentence}")
    return 0


def _subjects(arguments: argparse.Namespace) -> int:
    from properties import device
    from properties.subjects import table, verdicts

    if arguments.verdicts:
        verdicts.update(arguments.verdicts)
        return 0
    device.choose()
    if arguments.observe:
        table.show_observed(arguments.names)
    else:
        table.show(arguments.names)
    return 0


def _findings(arguments: argparse.Namespace) -> int:
    from properties import findings, sections

    del arguments
    found = findings.load_all()
    sections.write(findings.DOCUMENT, findings.SECTION, findings.markdown(found))
    print(f"{len(found)} findings")
    return 0


def _league(arguments: argparse.Namespace) -> int:
    from properties import device
    from properties.league import report, standings

    if arguments.merge:
        results = standings.merge([standings.read(path) for path in arguments.merge])
    else:
        here = device.choose(arguments.device)
        workers, gpus = verify.workers_for(arguments.device, arguments.workers)
        names = tuple(arguments.subjects or standings.runnable(here))
        drawn = arguments.cases, arguments.seed
        options = standings.Options(names, *drawn, arguments.device, workers, gpus, arguments.case_seconds)
        results = standings.compete(options)
    report.show(results)
    if arguments.json:
        standings.write(results, arguments.json)
    if arguments.plot:
        report.draw(results, arguments.plot)
    if arguments.markdown:
        arguments.markdown.write_text(report.markdown(results, arguments.plot, arguments.markdown.parent))
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from properties import probe

    return probe.run(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
