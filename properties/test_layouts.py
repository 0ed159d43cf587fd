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
from properties.variants import contiguous, decoding, in_short_chunks, one_call, with_a_full_tile


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
@given(case=cases(max_steps=1, dtypes=("float16",), min_rows=3, min_kv_heads=3, runs=4))
def test_offsets_may_pass_two_to_the_31(case: Case) -> None:
    """Batch rows, heads or tokens that pass 2**31 elements give the same bits and get the same tokens appended.

    Of three or more: of two, the stride itself would be a 64-bit number. The last place passes; of tokens also the last
    one of a tile of 16.
    """
    case = with_a_full_tile(contiguous(case), 16)
    dense = run(case).outputs
    last_key = max((row.cached for row in case.rows), default=1) - 1
    with callers.large_memory():
        for what, reaches in (("cache", (last_key, 15)), ("new", (None, 15))):
            for axes, reach in (((0, 1), None), ((2,), reaches[0]), ((2,), reaches[1])):
                far = run(case, callers.far_apart(subjects.active(), axes, what, reach))

                assert_same_outputs(far.outputs, dense, "tensors that span 2**31 elements and dense ones")
                assert_no_findings(far, ["append", "lengths", "inputs"])


@asks("cache", "bits across layouts")
@given(case=cases(max_steps=1, min_rows=1, runs=2))
def test_nothing_past_the_end_of_a_tensor_is_read(case: Case) -> None:
    """Not even what is thrown away: rows and columns of the last tile, tokens of the last slot.

    By the seed of a decode step, of a short chunk, or of what was drawn.
    """
    case = contiguous(one_call((case, decoding(case), in_short_chunks(case))[case.seed % 3]))
    walled = run(case, callers.before_inaccessible_memory(subjects.active()))

    assert_same_outputs(walled.outputs, run(case).outputs, "tensors at the end of memory and elsewhere")
    assert_no_findings(walled, ["append", "lengths", "inputs"])
