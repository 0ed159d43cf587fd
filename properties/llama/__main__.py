"""Real weights: the texts of flashcore and of eager attention, and every layer's error against its budget.

    python -m properties.llama [--tokens N] [--dtypes LIST] [--seconds S] [--extremes FOLDER]

Uses CUDA if there is one, and Triton's interpreter otherwise. Exit status: 0; 1 if something did not hold.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in installed packages

from properties import device as devices


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m properties.llama", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--tokens", type=int, help="greedy tokens a prompt; default 50, on a GPU 200")
    made.add_argument("--dtypes", help="names with commas; default float32, on a GPU float32,float16,bfloat16")
    made.add_argument("--seconds", type=float, default=float("inf"), help="begin no prompt after this many seconds")
    made.add_argument("--extremes", type=Path, help="store the most extreme attention problems in this folder")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every dtype; the exit status."""
    options = parser().parse_args(arguments)
    device = devices.choose()
    from properties.llama.extremes import Extremes
    from properties.llama.real import RealRun

    on_gpu = device == "cuda"
    dtypes = (options.dtypes or ("float32,float16,bfloat16" if on_gpu else "float32")).split(",")
    tokens = options.tokens or (200 if on_gpu else 50)
    deadline = time.monotonic() + options.seconds
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "gguf"))
    print(f"device: {devices.describe(device)}, {versions}", flush=True)
    extremes = Extremes()
    holds = True
    for dtype in dtypes:
        holds &= RealRun(dtype, device, tokens, deadline, extremes).report()
    if options.extremes is not None:
        options.extremes.mkdir(parents=True, exist_ok=True)
        for number, (kind, (_, slice_)) in enumerate(sorted(extremes.kept.items()), 1):
            (options.extremes / f"{number:04d}-{kind}.json").write_text(slice_.dumps())
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
