"""Where numbers lie in memory does not matter."""

from __future__ import annotations

from hypothesis import given

from properties import callers, subjects
from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import contiguous, one_call, with_tiles


@asks("bits across layouts")
@given(case=cases(runs=2))
def test_strided_inputs_equal_contiguous_ones(case: Case) -> None:
    """Transposed, sliced out of something larger, every second element, expanded: the same bits."""
    assert_same_outputs(run(case).outputs, run(contiguous(case)).outputs, "strided tensors and contiguous ones")


@asks("bits across layouts")
@given(case=cases(max_steps=2, runs=2))
def test_unaligned_inputs_equal_aligned_ones(case: Case) -> None:
    unaligned = run(case, callers.unaligned(subjects.active())).outputs

    assert_same_outputs(unaligned, run(case).outputs, "unaligned tensors and aligned ones")


@asks("bits across layouts", "cache in place")
@given(case=cases(max_steps=1, dtypes=("float16",), min_rows=2, min_kv_heads=2, runs=3))
def test_offsets_may_pass_two_to_the_31(case: Case) -> None:
    """Batch rows, heads or tokens 2**31 elements apart give the same bits and get the same tokens appended."""
    case = with_tiles(contiguous(one_call(case)), None, 16)
    dense = run(case).outputs
    for what in ("cache", "new"):
        far = run(case, callers.far_apart(subjects.active(), case.seed % 3, what))

        assert_same_outputs(far.outputs, dense, "tensors that span 2**31 elements and dense ones")
        assert_no_findings(far, ["append", "lengths", "inputs"])


@asks("cache", "bits across layouts")
@given(case=cases(max_steps=1, min_rows=1, runs=2))
def test_nothing_past_the_end_of_a_tensor_is_read(case: Case) -> None:
    """Not even what is thrown away: rows and columns of the last tile, tokens of the last slot."""
    case = contiguous(one_call(case))
    walled = run(case, callers.before_inaccessible_memory(subjects.active()))

    assert_same_outputs(walled.outputs, run(case).outputs, "tensors at the end of memory and elsewhere")
    assert_no_findings(walled, ["append", "lengths", "inputs"])
