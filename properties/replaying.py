"""``python -m properties replay`` and ``promote``: run stored cases again; keep one for good."""

from __future__ import annotations

import re
from pathlib import Path

from properties import laws, schedule, subjects
from properties.capabilities import NotOffered
from properties.case_file import MAX_STORY, CaseFile
from properties.exploring import Failure
from properties.pool import Death, Pool
from properties.requirements import CaseError
from properties.verify import REGRESSIONS, ask
from properties.worker import Check

FIXED, FAILED, ERROR = 0, 1, 2


def replay(files: list[Path], subject: str = subjects.DEFAULT, device: str = "auto", seconds: float = 60.0) -> int:
    """Run each case under its law; one line a case, the failure's text below it if it fails.

    Returns:
        0 if every case is fixed, 1 if one fails, 2 if one could not be run.
    """
    stored: list[tuple[Path, CaseFile]] = []
    status = FIXED
    for path in files:
        try:
            read = CaseFile.read(path)
            if schedule.digest(read.case) != read.digest:
                raise CaseError(f"{path}: digest must be that of the case's data; the file was edited or is damaged")
            stored.append((path, read))
        except CaseError as error:
            print(f"ERROR  {error}")
            status = ERROR
    if not stored:
        return status
    pool = Pool(1, subject, device)
    try:
        worker = pool.workers[0]
        known = worker.ready().laws
        for path, read in stored:
            name = laws.name_of(read.law)
            if name in worker.ready().not_offered:
                print(f"ERROR  {path}: {name}: not offered by {subject}: {worker.ready().not_offered[name]}")
                status = ERROR
                continue
            if name not in known:
                print(f"ERROR  {path}: law must be one of the suite's, got {read.law[:80]!r}")
                status = ERROR
                continue
            answer = ask(worker, Check(name, read.case), seconds)
            if isinstance(answer, Death):
                print(f"FAILED {path}: {name}: the kernel: {answer.how}")
            elif isinstance(answer.value, Failure):
                print(f"FAILED {path}: {name}\n{answer.value.report}")
            elif isinstance(answer.value, NotOffered):
                print(f"ERROR  {path}: {name}: not offered by {subject}: {answer.value}")
                status = ERROR
                continue
            else:
                print(f"FIXED  {path}: {name}")
                continue
            status = max(status, FAILED)
    finally:
        pool.stop()
    return status


def promote(path: Path, story: str, folder: Path = REGRESSIONS) -> Path:
    """Number a candidate into the regressions, with the story of what it shows.

    Raises:
        CaseError: the file is not a valid case, or the story is empty or too long.
    """
    story = " ".join(story.split())
    if not story or len(story) > MAX_STORY:
        raise CaseError(f"--story must have 1 to {MAX_STORY} characters, got {len(story)}")
    read = CaseFile.read(path)
    if schedule.digest(read.case) != read.digest:
        raise CaseError(f"{path}: digest must be that of the case's data; the file was edited or is damaged")
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.json")):
        known = CaseFile.read(old)
        if known.case == read.case and known.law == read.law:
            raise CaseError(f"{path}: is a regression already: {old}")
    numbers = [int(old.name[:4]) for old in folder.glob("[0-9][0-9][0-9][0-9]-*.json")]
    slug = "-".join(re.findall(r"[a-z0-9]+", story.lower())[:6]) or "case"
    target = folder / f"{max(numbers, default=0) + 1:04d}-{slug[:60]}.json"
    kept = CaseFile(read.law, read.subject, read.case, read.digest, story, read.provenance)
    target.write_text(kept.dumps())
    return target
