"""What a measurement was made on: GPU, driver, clocks, versions, commit and date."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from properties import device as devices

ROOT = Path(__file__).resolve().parents[1]
COMMIT_VARIABLE = "FLASHCORE_COMMIT"
"""Names the commit where the sources lie without their history."""


def describe(device: str) -> dict[str, Any]:
    """The header of a file of results, without the ceilings."""
    on_gpu = device == "cuda"
    versions = devices.versions()
    if on_gpu:
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none (Triton's interpreter)",
        "driver": (query_gpu("driver_version") or "unknown") if on_gpu else "none",
        "clocks": query_gpu("clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu") if on_gpu else None,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "figure_of_merit": on_gpu,
    }


def query_gpu(fields: str) -> str | None:
    """What nvidia-smi says of the first visible GPU; None where it says nothing. Changes no setting."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
    said = _output(command)
    return said.splitlines()[0].strip() if said else None


def commit(folder: Path = ROOT) -> str:
    """The commit of the sources, marked if they differ from it; "unknown" where there is no history."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE]
    head = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
    if not head:
        return "unknown"
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return head + ("+changes" if changed else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
