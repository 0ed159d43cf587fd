"""Which oracle sees which precision fault in the kernels' own source, on the data of ``precision_faults``.

    python -m properties.numerics.planted_faults [--fault NAME ...] [--write]

A fault of the simulator is a mutant here: a copy of flashcore with one change, in a process of its own. The cases are
those of ``precision_faults``, the arithmetic is that of the device at hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from properties.mutants.catalogue import select
from properties.mutants.mutant import write_mutated
from properties.numerics.families import Float64Array, Problem
from properties.numerics.oracles import Kernel, Seen, header, see
from properties.numerics.report import publish
from properties.pool import Answer, Worker
from properties.verify import ask
from properties.worker import Call
from references.simulator import FAULTS, Fault

PLANTED: dict[Fault, str] = {
    "qk_fp16_accumulator": "F312",
    "pv_fp16_accumulator": "F313",
    "accumulator_bf16_per_tile": "F314",
    "exp2_bf16": "F315",
    "p_fp8": "F316",
    "no_max": "M44",
    "scale_fp16": "F317",
    "scores_fp16": "F318",
    "skipped_rescale": "F319",
    "row_sum_bf16": "F320",
    "partials_bf16": "F321",
    "merge_exp": "F322",
    "p_truncated": "F323",
    "tf32": "F324",
}
HANG_SECONDS = 3600.0


def shipped(fmt: str) -> Kernel:
    """The kernels that this process imports, on the device at hand, always split."""
    import torch

    import flashcore
    from flashcore.fast import tuning
    from properties import device as devices
    from properties.subjects.flashcore import model

    device, dtype = devices.current(), getattr(torch, fmt)

    def attend(problem: Problem, block_n: int, kv_split_size: int) -> tuple[Float64Array, Float64Array]:
        arrays = problem.query, problem.key, problem.value
        q, k, v = (torch.from_numpy(array).to(device, dtype)[None] for array in arrays)
        with tuning.forced(path="split", kv_split_size=kv_split_size):
            result = flashcore.attention(q, k, v, block_n=block_n, scale=problem.scale, return_lse=True)
        out, lse = (tensor[0].to("cpu", torch.float64).numpy() for tensor in result)
        return out, lse

    return Kernel(fmt, model(device), attend)


def see_bfloat16() -> Seen:
    """For the worker: bfloat16."""
    return see(shipped("bfloat16"))


def see_float16() -> Seen:
    """For the worker: float16."""
    return see(shipped("float16"))


def see_float32() -> Seen:
    """For the worker: float32."""
    return see(shipped("float32"))


def seen_in(fault: Fault | None, fmt: str, device: str = "auto") -> Seen:
    """Let the oracles look at a copy of the shipped source, with a fault or without.

    Raises:
        RuntimeError: the copy crashed.
    """
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        folder = Path(name)
        if fault is not None:
            write_mutated(select([PLANTED[fault]])[0], folder)
        worker = Worker(folder, 0, "flashcore", device, first_on_path=name)
        try:
            worker.ready()
            answer = ask(worker, Call(f"properties.numerics.planted_faults:see_{fmt}"), HANG_SECONDS)
        finally:
            worker.stop()
    if not isinstance(answer, Answer) or not isinstance(answer.value, Seen):
        raise RuntimeError(f"{fault}: the planted copy must run, got {answer}")
    return answer.value


def row(fault: Fault | None, fmt: str) -> tuple[str, Seen]:
    """A table row: bold in "killed by" is what objects on N(0, 1) already."""
    seen = seen_in(fault, fmt)
    planted = "-"
    if fault is not None:
        mutant = select([PLANTED[fault]])[0]
        files = ", ".join(dict.fromkeys(Path(edit.file).name for edit in mutant.edits))
        planted = f"{mutant.id}, {files}: {mutant.change}"
    killed_by = ", ".join(f"**{name}**" if name in seen.on_gaussian else name for name in seen.anywhere)
    return f"| {' | '.join((fault or 'none (clean)', planted, killed_by or '-', *seen.cells))} |", seen


def main(argv: list[str] | None = None) -> int:
    """Print the tables; return 1 if a fault escaped all oracles or the shipped source raised one."""
    parser = argparse.ArgumentParser(prog="python -m properties.numerics.planted_faults", description=__doc__)
    parser.add_argument("--fault", nargs="+", choices=FAULTS, default=FAULTS, metavar="NAME", help="only these")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/numerics.md")
    arguments = parser.parse_args(argv)
    if arguments.write and arguments.fault != FAULTS:
        parser.error("--write needs all faults")

    wrong = []
    lines: list[str] = []
    for fmt in ("bfloat16", "float16", "float32"):
        body = header(fmt, "fault", "planted as", "killed by")
        for fault in (None, *(f for f in arguments.fault if (f == "tf32") == (fmt == "float32"))):
            text, seen = row(fault, fmt)
            wrong += [f"{fault or 'none'} in {fmt}"] if bool(seen.anywhere) != (fault is not None) else []
            body.append(text)
            print(text, flush=True)
        lines += [*body, ""]
    lines.append(
        f"Planted faults that escaped every oracle, and clean sources that raised one: {', '.join(wrong) or 'none'}."
    )
    print(lines[-1])
    if arguments.write:
        publish("planted faults", "\n".join(lines))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
