"""Run ``python -m properties`` as a user does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAIVE = "properties.subjects.naive:attention_with_kv_cache"
BROKEN = "properties.subjects.broken:attention_with_kv_cache"
DIFFERENTIAL = "output_and_lse_lie_within"


def properties(*arguments: object, folder: Path, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` with the checkout importable."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def command(*arguments: object) -> list[str]:
    """The command itself."""
    return [sys.executable, "-m", "properties", *map(str, arguments)]


def environment() -> dict[str, str]:
    """The caller's, with the checkout importable from any folder and no terminal width."""
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::ResourceWarning"}
