"""``python -m properties probe``: measure how the device at hand computes; write its arithmetic model.

Exponentials, logarithms and quotients are compared with float64. The matrix unit is identified from test
vectors and then compared, bit for bit, with the model they suggest. What cannot be measured (the constant's
roundings, the merge) is the kernel's and keeps its declared value.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from properties.probing.accumulator import KMAX, TESTS, Accumulator, Unit, agreement, identify
from references.arithmetic_model import HOPPER, INTERPRETER, ArithmeticModel
from references.rounding import as_format

# Rows of the product: 16 go through warp-level instructions, 64 through warp-group ones where there are any.
ROWS = {"16 rows": 16, "64 rows": 64}


def unit(fmt: str, device: str, rows: int) -> Unit:
    """``tl.dot`` on the device as a function of NumPy arrays."""
    import torch

    from properties.probing import kernels

    dtype = getattr(torch, fmt)

    def dot(a: Any, b: Any, c: Any) -> Any:
        left = torch.zeros((rows, KMAX), dtype=dtype)
        left[:TESTS] = torch.from_numpy(a).to(dtype)
        right = torch.from_numpy(np.ascontiguousarray(b)).to(dtype)
        start = torch.zeros((rows, TESTS), dtype=torch.float32)
        start[:TESTS] = torch.from_numpy(c).float()
        out = torch.empty_like(start, device=device)
        kernels.dot_kernel[(1,)](
            out, left.to(device), right.to(device), start.to(device), ROWS=rows, TERMS=KMAX, COLUMNS=TESTS
        )
        return out.cpu().numpy()[:TESTS]

    return dot


def accumulators(device: str) -> dict[str, tuple[Accumulator, float]]:
    """What each format's product does, and the share of random products that the finding reproduces."""
    found = {}
    for fmt in ("float16", "bfloat16", "float32"):
        if fmt == "bfloat16" and device == "cpu" and not _bfloat16_is_corrected():
            continue
        for name, rows in ROWS.items():
            dot = unit(fmt, device, rows)
            accumulator = identify(dot)
            found[f"{fmt}, {name}"] = accumulator, agreement(dot, accumulator, as_format(fmt))
    return found


def assemble(
    found: dict[str, tuple[Accumulator, float]],
    elementary: Any,
    base: ArithmeticModel,
    name: str,
    provenance: str,
) -> ArithmeticModel:
    """The model of everything measured, the worst of all formats where they differ.

    Only exhaustive measurements replace a documented bound; a sample (division, and all of the interpreter's)
    can only refute it.

    Raises:
        ValueError: a fused unit that its own finding does not reproduce, for which there is no model.
    """
    fused = [accumulator for accumulator, _ in found.values() if accumulator.fused]
    for label, (accumulator, same) in found.items():
        if accumulator.fused and same < 1.0:
            raise ValueError(f"{label} must agree with its model on every product, got {same:.4%}: {accumulator}")
    model = dataclasses.replace(
        base,
        name=name,
        provenance=provenance,
        accumulator="fused" if fused else "ieee",
        carried=any(accumulator.carried for accumulator, _ in found.values()),
        exp2_flushes=elementary.exp2_flushes,
        # Measured for products only, not inside the matrix unit.
        flush_to_zero=elementary.flushes or base.flush_to_zero,
        contraction=elementary.contracts,
        exp2_error=max(elementary.exp2_error, base.exp2_error),
        log2_error=max(elementary.log2_error, base.log2_error),
        division_error=max(elementary.division_error, base.division_error),
    )
    if not fused:
        return dataclasses.replace(model, fused_products=1, fused_fraction_bits=24)
    # One rounding up: the largest error seen over every argument is the bound.
    model = dataclasses.replace(
        model,
        exp2_error=math.nextafter(elementary.exp2_error, 1.0),
        log2_error=math.nextafter(elementary.log2_error, 1.0),
    )
    candidates = [
        dataclasses.replace(model, fused_products=a.fused_products, fused_fraction_bits=a.fused_fraction_bits)
        for a in fused
    ]
    return max(candidates, key=ArithmeticModel.fused_step_error)


def _bfloat16_is_corrected() -> bool:
    try:
        from flashcore.fast import interpreter
    except ImportError:
        return False
    interpreter.correct_bfloat16()
    return True


def _provenance(device: str) -> tuple[str, str]:
    """(name of the device, where and when it was measured)."""
    import torch
    import triton

    versions = f"triton {triton.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    if device == "cpu":
        return "interpreter", f"measured {date} in Triton's interpreter on {platform.machine()}, {versions}"
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    where = f"{name} (sm_{major}{minor}), driver {driver}, CUDA {torch.version.cuda}"
    return name, f"measured {date} on {where}, {versions}"


def run(out: Path | None = None) -> int:
    """Measure, print, and write the model, by default into ``fixtures/models``; 1 if what was found has no model."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # Read when a kernel is decorated: it must be set before the kernels are imported.
        os.environ["TRITON_INTERPRET"] = "1"
    from properties.probing import elementary as elementary_functions

    started = time.perf_counter()
    name, provenance = _provenance(device)
    with np.errstate(all="ignore"):
        found = accumulators(device)
        measured = elementary_functions.measure(device)
    record = {
        "provenance": provenance,
        "accumulators": {
            label: {**dataclasses.asdict(accumulator), "agreement": None if math.isnan(same) else same}
            for label, (accumulator, same) in found.items()
        },
        "elementary": dataclasses.asdict(measured),
    }
    print(json.dumps(record, indent=2))
    print(f"measured in {time.perf_counter() - started:.1f} s")
    try:
        model = assemble(found, measured, INTERPRETER if device == "cpu" else HOPPER, name, provenance)
    except ValueError as error:
        print(f"no model: {error}", file=sys.stderr)
        return 1
    out = out or Path("fixtures") / "models" / f"{name.lower().replace(' ', '_')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(model.to_json())
    figures = out.with_suffix(".measured.json")
    figures.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {out} and {figures}")
    return 0
