"""Layouts give every element a place of its own, and gaps where they say."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from properties.case import LAYOUTS
from properties.layouts import strides

SHAPE = (2, 3, 5, 7)


def places(layout: str, *, of_values: bool = False) -> NDArray[np.int64]:
    """Offset of every element."""
    return np.tensordot(strides(SHAPE, layout, of_values=of_values), np.indices(SHAPE), axes=1)


@pytest.mark.parametrize("of_values", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_do_not_share_memory_unless_heads_do(layout: str, of_values: bool) -> None:
    offsets = places(layout, of_values=of_values)
    distinct = offsets[:, :1] if layout == "expanded_heads" else offsets

    assert offsets.min() == 0
    assert len(np.unique(offsets)) == distinct.size


def test_padded_and_gapped_leave_gaps() -> None:
    span = {layout: places(layout).max() + 1 for layout in LAYOUTS}

    assert span["contiguous"] == span["transposed"] == 2 * 3 * 5 * 7
    assert span["expanded_heads"] == 2 * 5 * 7
    assert span["gapped"] > 2 * span["contiguous"]
    assert span["padded"] > 2 * span["contiguous"]


def test_transposed_memory_runs_over_heads_within_a_token() -> None:
    assert np.array_equal(places("transposed").transpose(0, 2, 1, 3).ravel(), np.arange(2 * 3 * 5 * 7))


def test_keys_and_values_that_are_not_contiguous_have_other_strides() -> None:
    for layout in ("transposed", "padded", "gapped"):
        keys, values = (strides((2, 3, 5, 16), layout, of_values=of_values) for of_values in (False, True))

        assert all(key != value for key, value in zip(keys[:3:2], values[:3:2], strict=True))


def test_gapped_values_keep_tokens_whole_and_leave_odd_head_strides() -> None:
    batch, head, token, element = strides(SHAPE, "gapped", of_values=True)

    assert (element, token - SHAPE[3], batch % 8, head % 2) == (1, 8, 0, 1)


@pytest.mark.parametrize("of_values", [False, True])
def test_padded_vectors_are_aligned_and_followed_by_a_gap(of_values: bool) -> None:
    shape = (2, 3, 5, 80)
    *outer, element = strides(shape, "padded", of_values=of_values)

    assert element == 1
    assert all(stride % 8 == 0 for stride in outer)
    assert outer[2] >= shape[3] + 8


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        strides(SHAPE, "diagonal")
