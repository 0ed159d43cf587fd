"""Every kernel that a call can be given to, on inputs that each one takes: head_dim 128, 16 bits, tiles of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given

from properties import subjects
from properties.assertions import assert_same_numbers, assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings, check_values
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.subjects import Subject
from properties.variants import alone, finite, for_every_kernel, on_the_lattice, roomy, with_own_heads
from properties.visible import reached_by

HALVES = ("float16", "bfloat16")


def kernels() -> Iterator[tuple[str, Subject]]:
    """The subject with each of its kernels forced, by name."""
    subject = subjects.active()
    for name, forced in subject.paths.items():
        yield name, subjects.forced_to(subject, forced)


@asks("tiles")
@given(case=cases(dtypes=HALVES, runs=3))
def test_every_kernel_lies_within_the_error_budget(case: Case) -> None:
    """And appends, counts and writes nothing else."""
    for _, kernel in kernels():
        made = run(for_every_kernel(case), kernel)
        check_values(made)
        assert_no_findings(made, ["append", "lengths", "inputs", "cache", "guard", "overflow", "raised"])


@asks("declared arithmetic", "tiles")
@given(case=cases(dtypes=HALVES, families=("lattice",), runs=4))
def test_every_kernel_gives_the_same_bits_on_the_lattice_at_head_dim_128(case: Case) -> None:
    case = for_every_kernel(on_the_lattice(case))
    outputs = run(case).outputs

    for name, kernel in kernels():
        assert_same_outputs(run(case, kernel).outputs, outputs, f"the {name} kernel and the chosen one")


@asks("bits across batches", "NaN in unread memory", "tiles")
@given(case=cases(dtypes=HALVES, min_rows=2, runs=6, overflow=False))
def test_every_kernel_gives_a_row_its_own_bits(case: Case) -> None:
    """Alone or beside others, and whatever lies in slots that it does not see."""
    case = roomy(for_every_kernel(case))

    for name, kernel in kernels():
        together = run(case, kernel).outputs
        assert_same_outputs(run(case, kernel, poisoned=False).outputs, together, f"{name}: clean and poisoned memory")
        for b in range(case.batch)[:1]:
            single = run(alone(case, b), kernel).outputs
            assert_same_outputs([got.rows(b) for got in together], single, f"{name}: row {b} in its batch and alone")


@asks("visible NaN", "bits across runs", "tiles")
@given(case=cases(dtypes=HALVES, non_finite=True, families=("normal", "integers", "rising"), runs=6))
def test_every_kernel_keeps_non_finite_numbers_from_what_does_not_see_them(case: Case) -> None:
    case = for_every_kernel(with_own_heads(case))

    for name, kernel in kernels():
        made, clean = run(case, kernel), run(finite(case), kernel).outputs
        steps = [step for step in made.steps if step.got is not None]
        for step, plain in zip(steps, clean, strict=True):
            got, (out, lse) = step.got, reached_by(case, step.plan)
            assert got is not None
            kept = np.where(out, 0.0, got.values), np.where(out, 0.0, plain.values)
            assert_same_numbers(f"out of the {name} kernel", got, *kept, "outputs that do not see it")
            kept = np.where(lse, 0.0, got.lse_values), np.where(lse, 0.0, plain.lse_values)
            assert_same_numbers(f"lse of the {name} kernel", got, *kept, "rows that do not see it")
