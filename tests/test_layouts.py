"""Layouts give every element a place of its own, and gaps where they say."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from properties.case import LAYOUTS
from properties.layouts import strides

SHAPE = (2, 3, 5, 7)


def places(layout: str) -> NDArray[np.int64]:
    """Offset of every element."""
    return np.tensordot(strides(SHAPE, layout), np.indices(SHAPE), axes=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_do_not_share_memory_unless_heads_do(layout: str) -> None:
    offsets = places(layout)
    distinct = offsets[:, :1] if layout == "expanded_heads" else offsets

    assert offsets.min() == 0
    assert len(np.unique(offsets)) == distinct.size


def test_only_gapped_leaves_gaps() -> None:
    span = {layout: places(layout).max() + 1 for layout in LAYOUTS}

    assert span["contiguous"] == span["transposed"] == 2 * 3 * 5 * 7
    assert span["expanded_heads"] == 2 * 5 * 7
    assert span["gapped"] > 2 * span["contiguous"]


def test_transposed_memory_runs_over_heads_within_a_token() -> None:
    assert np.array_equal(places("transposed").transpose(0, 2, 1, 3).ravel(), np.arange(2 * 3 * 5 * 7))


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        strides(SHAPE, "diagonal")
