"""Every kernel that a call can be given to, on inputs that each one takes: head_dim 128, 16 bits, tiles of its own."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given

from properties import subjects
from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings, check_values
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.subjects import Subject
from properties.variants import alone, finite, for_every_kernel, on_the_lattice, roomy, with_own_heads
from properties.visible import assert_reaches_what_sees_it

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
def test_every_kernel_passes_non_finite_numbers_on_to_exactly_what_sees_them(case: Case) -> None:
    case = for_every_kernel(with_own_heads(case))

    for _, kernel in kernels():
        assert_reaches_what_sees_it(run(case, kernel), run(finite(case), kernel).outputs)
