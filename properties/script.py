"""Write a failing case as one Python file that needs numpy, torch and the kernel under test, and nothing else."""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from properties import layouts
from properties.assertions import Float64Array
from properties.case import Case
from properties.checking import expectations
from properties.exploring import Failure
from properties.guards import BitsArray, poison
from properties.runner import Run, StepRun
from properties.schedule import PlannedStep, initial_cache, plan, problem
from properties.subjects import Subject

MAX_BYTES = 200_000
HANG_SECONDS = 120
TEMPLATE = Path(__file__).with_name("standalone.py")
# What the script's own checks can see. For the rest it calls the suite.
SHOWN = {"out", "lse", "shape", "unwritten", "raised", "overflow", "result", "lengths", "append", "cache", "inputs"}
SHOWN |= {"crash", "hang"}


def write(failure: Failure, subject: Subject, json_name: str) -> str:
    """The text of the script.

    Args:
        failure: the case and what went wrong.
        subject: the kernel it went wrong with.
        json_name: name of the case's file, beside which the script will lie.
    """
    cases = [failure.case]
    same_bits = None
    if failure.kind == "same bits" and len(failure.sightings) == 2:
        first, second = failure.sightings
        cases = [first.case] + [second.case] * (second.case != first.case)
        same_bits = (first.tensor, (first.step, first.index), (second.step, second.index))
    elif failure.kind not in SHOWN or failure.elsewhere:
        return _through_the_suite(failure, subject, json_name, "its own checks cannot show this")
    with_data = _with_data(failure, subject, cases, same_bits)
    if with_data is None or len(with_data) > MAX_BYTES:
        return _through_the_suite(failure, subject, json_name, "the data of this case is too large to embed")
    return with_data


def _header(failure: Failure, note: str) -> str:
    report = failure.report.replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{report}\n\n{note}\nExit status 1 if it still fails, 0 if not.\n"""\n'


def _through_the_suite(failure: Failure, subject: Subject, json_name: str, why: str) -> str:
    note = f"This script needs the project's suite: {why}."
    return (
        _header(failure, note)
        + textwrap.dedent(
            f"""
            import sys
            from pathlib import Path

            here = Path(__file__).resolve()
            sys.path.insert(0, str(here.parents[2]))
            from properties.__main__ import main

            if __name__ == "__main__":  # the suite runs cases in processes of their own
                sys.exit(main(["replay", str(here.with_name({json_name!r})), "--subject", {subject.spec!r}]))
            """
        ).lstrip()
    )


def _with_data(failure: Failure, subject: Subject, cases: list[Case], same_bits: tuple[Any, ...] | None) -> str | None:
    module, _, function = subject.spec.partition(":")
    runs = []
    for case in cases:
        elements = sum(step.query.size + step.key.size + step.value.size for step in plan(case))
        if elements > MAX_BYTES:
            return None
        runs.append(_run_data(case, subject))
    constants = {
        "SECONDS": HANG_SECONDS,
        "FMT": cases[0].dtype,
        "MODULE": module,
        "FUNCTION": function or "attention_with_kv_cache",
        "ALLOCATORS": [allocator.__name__ for allocator in subject.allocators],
        "SAME_BITS": same_bits,
        "RUNS": runs,
    }
    note = "Needs numpy, torch and the kernel under test alone."
    written = "\n".join(f"{name} = {_literal(value)}" for name, value in constants.items())
    template = TEMPLATE.read_text().split("from __future__ import annotations\n", 1)[1]
    kept = [line for line in template.splitlines() if not line.startswith(("# ruff:", "# mypy:"))]
    return f"{_header(failure, note)}from __future__ import annotations\n\n{written}\n" + "\n".join(kept) + "\n"


def _run_data(case: Case, subject: Subject) -> dict[str, Any]:
    made = Run(problem(case), subject, [StepRun(planned) for planned in plan(case)])
    with subject.forced(case):
        steps = [
            _step_data(case, step.plan, expected)
            for step, expected in zip(made.steps, expectations(made), strict=False)
        ]
    return {
        "op": case.op,
        "is_causal": case.is_causal,
        "scale": case.softmax_scale,
        "kv_split_size": case.kv_split_size,
        "index_dtype": "int64" if case.seed % 2 else "int32",
        "cache": _cache_data(case, subject),
        "steps": steps,
    }


def _cache_data(case: Case, subject: Subject) -> dict[str, Any] | None:
    given = initial_cache(case)
    if given is None:
        return None
    unwritten = np.arange(case.capacity) >= np.array(given.seq_lens, np.int64)[:, None]
    buffers = []
    for bits, of_values in ((given.key, False), (given.value, True)):
        np.moveaxis(bits, 2, 1)[unwritten] = poison(case.dtype, "unused")
        buffers.append(_tensor(bits, case.cache_layout, of_values))
    return {
        "buffers": buffers,
        "seq_lens": list(given.seq_lens),
        "as_object": case.start == "kv_cache" and subject.make_cache is not None,
    }


def _step_data(case: Case, planned: PlannedStep, expected: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"is_causal": case.is_causal}
    for name in ("scale", "block_m", "block_n"):
        if getattr(case, name) is not None:
            arguments[name] = getattr(case, name)
    if case.op == "attention_with_kv_cache":
        arguments |= {"cache_max_len": case.cache_max_len, "update_cache": planned.step.update_cache}
        if any(new != planned.q_len for new in planned.new_lens):
            arguments["new_lens"] = list(planned.new_lens)
        if planned.passes_seq_lens:
            arguments["seq_lens"] = list(planned.seq_lens)
    padding = planned.is_padding
    tensors = {}
    for name in ("query", "key", "value"):
        bits = getattr(planned, name).copy()
        if case.op == "attention_with_kv_cache":
            np.moveaxis(bits, 2, 1)[padding] = poison(case.dtype, "unused")
        layout = case.query_layout if name == "query" else case.key_layout
        tensors[name] = _tensor(bits, layout, name == "value")
    budgets = []
    if expected is not None:
        budgets = [
            _budget(expected.out_budget, expected.overflow_free[..., None]),
            _budget(expected.lse_budget, expected.overflow_free),
        ]
    return {
        "parent": planned.parent,
        "seq_lens": list(planned.seq_lens),
        "lengths": list(planned.new_lens),
        "overflows": planned.overflow_row is not None,
        "stores": planned.stores,
        "arguments": arguments,
        **tensors,
        "budgets": budgets,
    }


def _tensor(bits: BitsArray, layout: str, of_values: bool) -> tuple[list[int], list[int], str]:
    return list(bits.shape), list(layouts.strides(bits.shape, layout, of_values=of_values)), digits(bits)


def _budget(budget: Float64Array, overflow_free: NDArray[np.bool_]) -> tuple[list[int], str]:
    """As float32, rounded up; negative where a kernel may overflow."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = budget.astype(np.float32)
        narrow = np.where(narrow < budget, np.nextafter(narrow, np.float32(np.inf)), narrow)
    signed = np.where(overflow_free, narrow, -narrow).astype(np.float32)
    return list(budget.shape), digits(signed.view(np.uint32))


def digits(bits: BitsArray) -> str:
    """Bit patterns as hexadecimal digits, runs of one pattern as "3c00*17"."""
    width = 2 * bits.itemsize
    words: list[str] = []
    plain = ""
    for pattern, run in groupby(bits.ravel().tolist()):
        count = sum(1 for _ in run)
        if count > 4:
            words += [plain] * bool(plain) + [f"{pattern:0{width}x}*{count}"]
            plain = ""
        else:
            plain += f"{pattern:0{width}x}" * count
    return " ".join(words + [plain] * bool(plain))


def _literal(value: Any, indent: int = 0) -> str:
    """A literal a person can read: one field a line, long digits wrapped."""
    pad = " " * (indent + 4)
    if len(repr(value)) <= 90 and not isinstance(value, dict):
        return repr(value)
    if isinstance(value, dict):
        fields = [f"{pad}{key!r}: {_literal(item, indent + 4)},\n" for key, item in value.items()]
        return "{\n" + "".join(fields) + " " * indent + "}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | str | tuple | list) for item in value):
        items = [f"{pad}{_literal(item, indent + 4)},\n" for item in value]
        return "[\n" + "".join(items) + " " * indent + "]"
    if isinstance(value, str) and len(value) > 90:
        words = [word[i : i + 80] for word in value.split(" ") for i in range(0, len(word), 80)]
        lines = textwrap.wrap(" ".join(words), 100)
        return '"""\n' + "\n".join(lines) + '\n"""'
    return repr(value)
